"""One rank's part of a micro-batch.

A packed sample has S+1 tokens: the first S are the inputs, the last S the labels. If context parallelism needs another
length, padding is appended as a separate document whose losses do not count. Each rank gets S/CP tokens by the
`TokenLayout`, with their positions. Everything downstream (rotary angles, loss by position, attention) relies on these
explicit positions and on the plan, never on the index in the shard.

If documents are masked from each other, the last token of a document does not predict the first of the next, and
positions start again in every document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megalong.attention.layout import tokens_of
from megalong.attention.plan import AttentionPlan, SequencePlan
from megalong.batches.context_shard import ContextShard, read_spans
from megalong.data.samples.sample import Sample


@dataclass(frozen=True)
class MicroBatch:
    """One rank's part of a micro-batch.

    Shapes: tokens, labels int64 [b, S/CP] (zeros on a pipeline stage that needs none); loss_mask float32 [b, S/CP] (1
    where the label counts); positions int64 [1 or b, S/CP]; weights float32 [b, 2, S/CP] if the loss is not a mean over
    tokens. S is the padded length. `filled`: number of these tokens that are not padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    plan: AttentionPlan
    weights: torch.Tensor | None = None
    filled: int = 0

    @property
    def loss_weights(self) -> torch.Tensor:
        """float32 [b, S/CP]: the weight of each loss in the sum."""
        return self.loss_mask if self.weights is None else self.weights[:, 0]

    @property
    def units(self) -> torch.Tensor:
        """float32 [b, S/CP], whole numbers: what each label adds to the divisor of the sum."""
        return self.loss_mask if self.weights is None else self.weights[:, 1]

    @property
    def seq_length(self) -> int:
        """Tokens of a whole padded sample."""
        return self.plan.sequences[0].seq_length

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of every document in the batch, padding included as one; whole samples without document masks."""
        plans = self.plan.sequences * (len(self.tokens) // len(self.plan.sequences))
        return [int(n) for plan in plans for n in np.diff(plan.starts, append=plan.seq_length)]

    def pinned(self) -> MicroBatch:
        """The same in pinned memory, for asynchronous copies to a GPU."""
        return self._with(lambda tensor: tensor.contiguous().pin_memory())

    def to(self, device: torch.device | None) -> MicroBatch:
        """The same on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        tokens, labels, loss_mask, positions = map(change, (self.tokens, self.labels, self.loss_mask, self.positions))
        weights = None if self.weights is None else change(self.weights)
        return MicroBatch(tokens, labels, loss_mask, positions, self.plan, weights, self.filled)


def make_micro_batch(rows: Sequence[Sample], shard: ContextShard) -> MicroBatch:
    """The rank's micro-batch of `rows`, on the CPU: plans, reads and assembles it."""
    plan = shard.plan(list(rows))
    return batch_of(rows, shard, plan, read_tokens(rows, shard, plan, np.dtype(np.int64)))


def read_tokens(
    rows: Sequence[Sample], shard: ContextShard, plan: AttentionPlan, dtype: np.dtype[Any]
) -> list[torch.Tensor]:
    """For each row, the tokens that the rank reads (context_shard.py), as `dtype`, which must fit the ids."""
    return [
        torch.from_numpy(shard.read(row, shard.runs(sequence), dtype))
        for row, sequence in zip(rows, sequences_of(plan, rows), strict=True)
    ]


def batch_of(
    rows: Sequence[Sample], shard: ContextShard, plan: AttentionPlan, own: Sequence[torch.Tensor] | None
) -> MicroBatch:
    """The rank's micro-batch of `rows`: tokens and labels on the device of `own`, the rest on the CPU.

    Args:
        own: the result of `read_tokens`, of any integer type; None on a pipeline stage that needs no tokens.
    """
    length = len(rows[0].tokens) - 1
    indices = [tokens_of(shard.runs(sequence)) for sequence in plan.sequences]
    each = indices * (len(rows) // len(indices))
    mask = np.stack([_counted(row, here, length, shard.masked) for row, here in zip(rows, each, strict=True)])
    if rows[0].positions is None:
        positions = [
            _positions(here, sequence.starts, length) for here, sequence in zip(indices, plan.sequences, strict=True)
        ]
    else:
        positions = [_padded(row.positions, here, length) for row, here in zip(rows, each, strict=True)]
    if own is None:
        tokens = labels = torch.zeros((), dtype=torch.int64).expand(mask.shape)
    else:
        shards = zip(own, sequences_of(plan, rows), strict=True)
        pairs = [_shifted(read, read_spans(shard.runs(s), length), mask.shape[1]) for read, s in shards]
        tokens, labels = (torch.stack(one) for one in zip(*pairs, strict=True))
    weights = _weights(rows, each, length)
    filled = sum(int(np.count_nonzero(here < min(row.filled, length))) for row, here in zip(rows, each, strict=True))
    loss_mask, stacked = torch.from_numpy(mask), torch.from_numpy(np.stack(positions))
    return MicroBatch(tokens, labels, loss_mask, stacked, plan, weights, filled)


def sequences_of(plan: AttentionPlan, rows: Sequence[Sample]) -> list[SequencePlan]:
    """The plan of each row."""
    return list(plan.sequences) * (len(rows) // len(plan.sequences))


def _shifted(own: torch.Tensor, spans: list[tuple[int, int]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) of a row, int64 [count] each: spans without their last or first token, then zeros."""
    tokens, labels = (torch.zeros(count, dtype=torch.int64, device=own.device) for _ in range(2))
    at = filled = 0
    for first, stop in spans:
        length = stop - first
        tokens[filled : filled + length - 1] = own[at : at + length - 1]
        labels[filled : filled + length - 1] = own[at + 1 : at + length]
        at, filled = at + length, filled + length - 1
    return tokens, labels


def _counted(row: Sample, indices: np.ndarray, length: int, masked: bool) -> np.ndarray:
    """float32, for the tokens `indices` of a row: 1 where the next token is a target in the same document."""
    counted = indices + 1 < min(row.filled, length + 1)
    if row.targets is not None:
        counted &= _padded(row.targets[1:], indices, length)
    if masked:
        lasts = row.documents[row.documents > 0] - 1
        where = np.searchsorted(indices, lasts)
        here = where < len(indices)
        here[here] = indices[where[here]] == lasts[here]
        counted[where[here]] = False
    return counted.astype(np.float32)


def _weights(rows: Sequence[Sample], each: Sequence[np.ndarray], length: int) -> torch.Tensor | None:
    """float32 [b, 2, S/CP]: `Sample.weights` of the labels; None if samples have none."""
    if rows[0].weights is None:
        return None
    pairs = [[_padded(one[1:], here, length) for one in row.weights] for row, here in zip(rows, each, strict=True)]  # type: ignore[union-attr]
    return torch.from_numpy(np.array(pairs, np.float32))


def _positions(indices: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Positions in the document; 0 for padding, of which there may be more than there are tokens."""
    positions = indices - starts[np.searchsorted(starts, indices, side="right") - 1]
    positions[indices >= length] = 0
    return positions


def _padded(values: np.ndarray | None, indices: np.ndarray, length: int) -> np.ndarray:
    """`values` [length] at `indices`, with zeros for padding."""
    assert values is not None
    out = np.zeros(len(indices), values.dtype)
    inside = int(np.searchsorted(indices, length))
    out[:inside] = values[indices[:inside]]
    return out
