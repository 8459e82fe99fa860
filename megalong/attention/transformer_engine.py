"""Transformer Engine's attention (TE): FP8 on a GPU, and its own context parallelism.

TE exchanges keys or heads itself, so it takes the place of exchange.py, transport.py and the kernels at once:

    attention.exchange      TE's cp_comm_type    its group
    ring                    p2p                  the context-parallel ranks
    all_gather              all_gather           the same
    ulysses                 a2a                  the same
    ring_ulysses            a2a+p2p              [neighbours that share heads, ranks that share keys]

It knows two layouts of tokens, both zigzag: of the whole sequence (`sbhd`), or of every document in a pack laid end to
end (`thd`), whose boundaries it takes as cumulative lengths over all ranks. A rank's tokens lie document by document,
early chunk and late, which is `per_document_zigzag` where every document is a multiple of 2 x ranks.

    documents of 8 and 4 tokens, 2 ranks     rank 0: 0 1 6 7  8 11     rank 1: 2 3 4 5  9 10     cumulative: 0 8 12

Whether it computes in FP8 is the business of the `fp8_autocast` that Megatron-Core puts around a transformer block.
Windows count keys before the query: `window_size` W is TE's (W - 1, 0). YaRN's temperature is in the scale.

The one file that imports transformer_engine, and only where it is used. Written against version 2.20; it has not met a
GPU yet (tests/gpu/test_transformer_engine.py is the check to start with).
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
    """What this process's device and installation can do."""
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
        window: keys a query sees at most, its own included; None: all before it in its document.
        layer_number: from 1.
        context: how context-parallel ranks share attention.
        ranks: the whole context-parallel group, None for one rank.

    Raises:
        UserError: key heads cannot be shared among ranks; TE, unlike our exchange, does not copy them.
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
        """q `[s, b, h, d]`, k and v `[s, b, g, d]`, result like q; s tokens of this rank, laid out as TE has it."""
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
    """TE's arguments for `attention.exchange`; none for one rank."""
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
    """Where TE runs every other step of a ring, so that their tails overlap."""
    return torch.cuda.Stream()


def document_arguments(plan: AttentionPlan, batch: int, ranks: int, device: torch.device) -> dict[str, Any]:
    """TE's arguments for documents laid end to end, all rows of the batch one after the other; kept in the plan.

    Raises:
        UserError: several ranks, and a document that is no multiple of 2 x ranks.
    """
    return plan.kept(("documents", batch, ranks, device), lambda: _document_arguments(plan, batch, ranks, device))


def _document_arguments(plan: AttentionPlan, batch: int, ranks: int, device: torch.device) -> dict[str, Any]:
    bounds = document_bounds(plan, batch)
    lengths = np.diff(bounds)
    odd = lengths[lengths % (2 * ranks) != 0]
    if ranks > 1 and len(odd):
        raise UserError(
            f"attention.backend: transformer_engine over {ranks} context-parallel ranks takes documents of a multiple "
            f"of {2 * ranks} tokens, and one has {odd[0]}; write backend: torch, which takes any"
        )
    cumulative = upload.to_device(bounds.astype(np.int32), device)
    longest = int(lengths.max())
    # That both pairs are the same objects is how TE knows that nothing lies between documents.
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
    """Where documents begin, and the end of the last, in all rows laid end to end: int64, from 0."""
    sequences = plan.sequences * batch if len(plan.sequences) == 1 else plan.sequences
    size = sequences[0].seq_length
    assert len(sequences) == batch
    assert batch * size < 2**31
    rows = [sequence.starts + row * size for row, sequence in enumerate(sequences)]
    return np.append(np.concatenate(rows), batch * size)
