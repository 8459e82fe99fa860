"""A micro-batch as one rank sees it, and what of it travels to the attention layers.

A packed sample holds S+1 tokens: the first S are read, the last S are to be predicted. Where context parallelism needs
another length they are padded behind, as a document of their own whose losses do not count; nobody sees it happen.
Each rank gets S/CP tokens, those that its `TokenLayout` says; their positions say which ones they are. Everything
downstream (rotary angles, loss by position, attention) relies on these explicit positions and on the plan, never on
the index in the shard.

Where documents are masked from each other, the token that ends one does not predict the one that begins the next, and
positions start again with every document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megalong.attention.layout import TokenLayout, tokens_of
from megalong.attention.plan import AttentionPlan, make_plan
from megalong.rope import cos_sin


@dataclass
class AttentionInputs(PackedSeqParams):
    """Positions of this rank's tokens and the plan of their attention, on the way to core attention.

    Megatron-Core hands `packed_seq_params` through recomputation and to the layers of every pipeline stage, which it
    does not do for `position_ids`; module state would not do, because several micro-batches are in flight at once.
    `qkv_format="sbhd"` tells it that nothing is packed as far as its own code is concerned.

    `positions` int64 [1 or b, s], one row where all rows are alike.
    """

    qkv_format: str = "sbhd"
    positions: torch.Tensor | None = None
    plan: AttentionPlan | None = None
    _rotary: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    def rotary(self, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [s, 1 or b, head_dim / 2] float32: made by the first layer, shared by the others.

        All layers of a model have the same frequencies.
        """
        if self._rotary is None:
            assert self.positions is not None
            self._rotary = cos_sin(inverse_frequencies, self.positions.t())
        return self._rotary


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of a micro-batch.

    Shapes: tokens, labels int64 [b, S/CP]; loss_mask float32 [b, S/CP] (1 where the label counts); positions int64
    [1 or b, S/CP]. S is the padded length.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    plan: AttentionPlan

    @property
    def seq_length(self) -> int:
        """Tokens of a whole padded sample."""
        return self.plan.sequences[0].seq_length

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of every document in the batch, padding being one; whole samples where all is one document."""
        plans = self.plan.sequences * (len(self.tokens) // len(self.plan.sequences))
        return [int(n) for plan in plans for n in np.diff(plan.starts, append=plan.seq_length)]

    def attention_inputs(self) -> AttentionInputs:
        """What core attention needs to know of this micro-batch."""
        return AttentionInputs(positions=self.positions, plan=self.plan)


def shard_samples(
    samples: torch.Tensor,
    layout: TokenLayout,
    context_rank: int,
    device: torch.device | None = None,
    documents: Sequence[np.ndarray] | None = None,
    multiple: int = 1,
    filled: Sequence[int] | None = None,
) -> MicroBatch:
    """Cut a rank's share out of whole samples.

    Args:
        samples: int64 [b, S+1] token ids, the same on every rank of the context-parallel group.
        layout: how tokens lie on context-parallel ranks.
        context_rank: this rank's index in the context-parallel group.
        documents: for each row the tokens of the sample at which a document begins, int64 ascending from 0; None:
            every token sees all before it.
        multiple: what the padded length must be a multiple of besides `layout.multiple`.
        filled: for each row how many of its S+1 tokens are documents'; the rest is padding, which is no target. None:
            all of them. Where documents are given, padding begins as one of them.
    """
    length = samples.shape[1] - 1
    padded = -(-length // math.lcm(layout.multiple, multiple)) * math.lcm(layout.multiple, multiple)
    plan = make_plan(layout, padded, _starts(documents, length, padded, len(samples)))
    shares = [
        (rows, torch.from_numpy(tokens_of(sequence.shards[context_rank].runs)), sequence.starts)
        for rows, sequence in plan.rows()
    ]
    inputs = torch.nn.functional.pad(samples[:, :-1], (0, padded - length))
    targets = torch.nn.functional.pad(samples[:, 1:], (0, padded - length))
    counted = _counted(documents, length, padded, filled or [length + 1] * len(samples))
    tokens, labels, mask = (
        torch.cat([whole[rows][:, indices] for rows, indices, _ in shares]).to(device)
        for whole in (inputs, targets, counted)
    )
    positions = torch.stack([_positions(indices, starts, length) for _, indices, starts in shares]).to(device)
    return MicroBatch(tokens, labels, mask, positions, plan)


def _starts(documents: Sequence[np.ndarray] | None, length: int, padded: int, rows: int) -> Sequence[np.ndarray] | None:
    """First tokens of the documents of every row, padding being the last of them."""
    padding = np.array([length] if padded > length else [], np.int64)
    if documents is None:
        return [np.append(np.zeros(1, np.int64), padding)] * rows if len(padding) else None
    return [np.append(starts[starts < length], padding) for starts in documents]


def _counted(documents: Sequence[np.ndarray] | None, length: int, padded: int, filled: Sequence[int]) -> torch.Tensor:
    """float32 [b, padded]: 1 where the next token belongs to the same document."""
    targets = torch.arange(1, padded + 1)
    counted = (targets < torch.tensor(filled)[:, None].clamp(max=length + 1)).float()
    for row, starts in enumerate(documents or ()):
        counted[row, torch.from_numpy(starts[starts > 0] - 1)] = 0
    return counted


def _positions(indices: torch.Tensor, starts: np.ndarray, length: int) -> torch.Tensor:
    """Places in the document; 0 for padding, of which there may be more than there are tokens."""
    begin = torch.from_numpy(starts)
    places = indices - begin[torch.searchsorted(begin, indices, right=True) - 1]
    return places.masked_fill_(indices >= length, 0)
