"""Transformer Engine's attention (TE): FP8 on a GPU, and its own context parallelism.

TE exchanges keys or heads itself, so it replaces exchange.py, transport.py and the kernels at once:

    attention.exchange      TE's cp_comm_type    its group
    ring                    p2p                  the context-parallel ranks
    all_gather              all_gather           the same
    ulysses                 a2a                  the same
    ring_ulysses            a2a+p2p              [neighbours that share heads, ranks that share keys]

It supports two token layouts, both zigzag: of the whole sequence (`sbhd`), or of every document in a pack laid end to
end (`thd`), with document boundaries as cumulative lengths over all ranks. A rank has the early and the late chunk of
each document, document by document. This equals `per_document_zigzag` if every document is a multiple of 2 x ranks.

    documents of 8 and 4 tokens, 2 ranks     rank 0: 0 1 6 7  8 11     rank 1: 2 3 4 5  9 10     cumulative: 0 8 12

The `fp8_autocast` that Megatron-Core puts around a transformer block decides whether TE computes in FP8. TE's windows
count the keys before the query: `window_size` W is TE's (W - 1, 0). YaRN's temperature is part of the scale.

Only this file imports transformer_engine, and only on use. Written against version 2.20; not yet run on a GPU
(tests/gpu/test_transformer_engine.py is the check to start with).
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalong.attention import upload
from megalong.attention.exchange import ContextGroups
from megalong.attention.plan import AttentionPlan
from megalong.config.attention_checks import Machine
from megalong.errors import UserError


def machine_of(device: torch.device) -> Machine:
    """What this process's device and installation support."""
    if device.type != "cuda":
        return Machine()
    recipe = os.environ.get("NVTE_DPA_FP8_RECIPE", "")
    return Machine(torch.cuda.get_device_capability(device), _can_be_imported(), recipe)


def _can_be_imported() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # without its CUDA part it raises RuntimeError, not ImportError
        return False
    return True


class EngineAttention(torch.nn.Module):
    """TE's `DotProductAttention` on this rank's heads, called as our own attention is.

    Args:
        heads, groups: query and key heads on this tensor-parallel rank.
        head_dim: channels of a head.
        scale: of the scores.
        window: maximum number of keys per query, its own included; None: all earlier keys of its document.
        layer_number: from 1.
        context: how context-parallel ranks share attention.
        ranks: the whole context-parallel group, None for one rank.

    Raises:
        UserError: key heads cannot be split over ranks; TE, unlike our exchange, does not copy them.
    """

    def __init__(
        self,
        heads: int,
        groups: int,
        head_dim: int,
        scale: float,
        window: int | None,
        layer_number: int,
        context: ContextGroups,
        ranks: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        if groups % context.heads_size:
            raise UserError(
                f"attention.exchange: {context.heads_size} ranks cannot share {groups} key heads under "
                "attention.backend: transformer_engine; write exchange: ring, or backend: torch"
            )
        self.ranks = 1 if ranks is None else dist.get_world_size(ranks)
        engine: Any = importlib.import_module("transformer_engine.pytorch")
        self.engine = engine.DotProductAttention(
            num_attention_heads=heads,
            kv_channels=head_dim,
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
            window_size=None if window is None else (window - 1, 0),
            layer_number=layer_number,
            softmax_scale=scale,
            **context_arguments(context, ranks),
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """q `[s, b, h, d]`, k and v `[s, b, g, d]`, result like q; s tokens of this rank, in TE's layout."""
        length, batch, heads, channels = q.shape
        if all(len(sequence.starts) == 1 for sequence in plan.sequences):
            out = self.engine(q, k, v, qkv_format="sbhd", attn_mask_type="causal")
            return out.view(length, batch, heads, channels)
        packed = (t.transpose(0, 1).reshape(batch * length, *t.shape[2:]) for t in (q, k, v))
        out = self.engine(
            *packed, attn_mask_type="padding_causal", **document_arguments(plan, batch, self.ranks, q.device)
        )
        return out.view(batch, length, heads, channels).transpose(0, 1)


def context_arguments(context: ContextGroups, ranks: dist.ProcessGroup | None) -> dict[str, Any]:
    """TE's arguments for `attention.exchange`; empty for one rank."""
    if ranks is None:
        return {}
    group: Any = ranks
    if context.heads is not None and context.keys is not None:
        kind, group = "a2a+p2p", [context.heads, context.keys]
    elif context.heads is not None:
        kind = "a2a"
    else:
        kind = "p2p" if context.transport == "ring" else "all_gather"
    return {
        "cp_group": group,
        "cp_global_ranks": dist.get_process_group_ranks(ranks),
        "cp_stream": _second_stream(),
        "cp_comm_type": kind,
    }


@functools.cache
def _second_stream() -> torch.cuda.Stream:
    """The stream on which TE runs every other step of a ring, so that their tails overlap."""
    return torch.cuda.Stream()


def document_arguments(plan: AttentionPlan, batch: int, ranks: int, device: torch.device) -> dict[str, Any]:
    """TE's arguments for documents laid end to end, all rows of the batch in turn; cached in the plan.

    Raises:
        UserError: there are several ranks, and a document is not a multiple of 2 x ranks.
    """
    return plan.cached(("documents", batch, ranks, device), lambda: _document_arguments(plan, batch, ranks, device))


def _document_arguments(plan: AttentionPlan, batch: int, ranks: int, device: torch.device) -> dict[str, Any]:
    bounds = document_bounds(plan, batch)
    lengths = np.diff(bounds)
    odd = lengths[lengths % (2 * ranks) != 0]
    if ranks > 1 and len(odd):
        raise UserError(
            f"attention.backend: transformer_engine over {ranks} context-parallel ranks needs documents of a multiple "
            f"of {2 * ranks} tokens, but one has {odd[0]}; write backend: torch, which supports any length"
        )
    cumulative = upload.to_device(bounds.astype(np.int32), device)
    longest = int(lengths.max())
    # TE sees that both pairs are the same objects, and so that there is no padding between documents.
    return {
        "qkv_format": "thd",
        "cu_seqlens_q": cumulative,
        "cu_seqlens_kv": cumulative,
        "cu_seqlens_q_padded": cumulative,
        "cu_seqlens_kv_padded": cumulative,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }


def document_bounds(plan: AttentionPlan, batch: int) -> np.ndarray:
    """The first tokens of documents and the end of the last, in all rows laid end to end: int64, from 0."""
    sequences = plan.sequences * batch if len(plan.sequences) == 1 else plan.sequences
    size = sequences[0].seq_length
    assert len(sequences) == batch
    assert batch * size < 2**31
    rows = [sequence.starts + row * size for row, sequence in enumerate(sequences)]
    return np.append(np.concatenate(rows), batch * size)
