"""Loss by position: does a token late in the sequence profit from everything before it?

The mean loss of a long sequence hides where the loss comes from: a model that breaks beyond position 8K still has a
good mean if most tokens are before it. So losses are averaged in buckets whose width doubles, because context helps
logarithmically:

    bucket_edges(4096)   ->  0 64 128 256 512 1024 2048 4096          (short: the first bucket is 64 tokens)
    bucket_edges(131072) ->  0 1K 2K 4K 8K 16K 32K 64K 128K           (from 16K on: the first bucket is 1K tokens)
    bucket_edges(5000)   ->  0 64 128 256 512 1024 2048 4096 5000     (the last edge is always the sequence length)

A position is the index in the sample. If positions skip ahead (`data.pose`), it is the position that the model gets,
and edges reach to the target length. Under context parallelism a rank has scattered positions; each rank adds its own,
and one all-reduce of 2 x buckets numbers sums them. Adding never waits for the device: sums stay there in float64 and
are read once, by `means`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

FIRST_EDGE_SHORT = 64
FIRST_EDGE_LONG = 1024
LONG_FROM = 16 * 1024


def bucket_edges(seq_length: int) -> list[int]:
    """Edges `0 = e0 < e1 < ... < en = seq_length`; bucket i contains the positions `e[i] <= p < e[i+1]`."""
    if seq_length < 1:
        raise ValueError(f"seq_length {seq_length}: must be at least 1")
    edge = FIRST_EDGE_LONG if seq_length >= LONG_FROM else FIRST_EDGE_SHORT
    edges = [0]
    while edge < seq_length:
        edges.append(edge)
        edge *= 2
    return [*edges, seq_length]


def bucket_labels(edges: list[int]) -> list[str]:
    """Short names for tables: `0-64`, ..., `512-1K`, `1K-2K`, `1M-2M`."""
    return [f"{_short(low)}-{_short(high)}" for low, high in pairwise(edges)]


def _short(tokens: int) -> str:
    for unit, letter in ((1024 * 1024, "M"), (1024, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


class PositionLoss:
    """Running sum and count of token losses per position bucket, kept on the device of the losses."""

    def __init__(self, seq_length: int) -> None:
        self.edges = bucket_edges(seq_length)
        self._sums_counts: Tensor | None = None  # [2, buckets] float64
        self._upper_edges: Tensor | None = None  # [buckets] on the same device

    def add(self, losses: Tensor, positions: Tensor, mask: Tensor | None = None) -> None:
        """Add one micro-batch.

        Args:
            losses: `[b, s]` loss of each token in nats.
            positions: `[s]` or `[b, s]` int64 position of each token, below `seq_length`.
            mask: `[b, s]`, non-zero where the token counts; None counts every token.
        """
        sums_counts, upper_edges = self._state(losses.device)
        bucket = torch.bucketize(positions.to(losses.device), upper_edges, right=True)
        weights = torch.ones_like(losses) if mask is None else mask.to(losses)
        # A masked token's loss may be NaN or infinite (padding): 0 x NaN would make the whole bucket NaN.
        weighted = torch.where(weights != 0, losses.detach() * weights, 0.0)
        index = bucket.expand(losses.shape).reshape(-1)
        both = torch.stack([weighted.reshape(-1), weights.reshape(-1)]).double()
        sums_counts.index_add_(1, index, both)

    def _state(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._sums_counts is None or self._upper_edges is None:
            self._sums_counts = torch.zeros(2, len(self.edges) - 1, dtype=torch.float64, device=device)
            self._upper_edges = torch.tensor(self.edges[1:], device=device)
        return self._sums_counts, self._upper_edges

    def reduce(self, group: dist.ProcessGroup | None, device: torch.device | str = "cpu") -> None:
        """Sum over `group` (None: the whole world), in place; every rank of it must call this.

        A rank that added nothing (it had no tokens) creates its zeros on `device`, which the group's backend must
        support.
        """
        sums_counts, _ = self._state(torch.device(device))
        dist.all_reduce(sums_counts, group=group)

    def merge(self, other: PositionLoss) -> None:
        """Add this rank's sums of `other`, which must have the same length."""
        if other._sums_counts is not None:
            self._state(other._sums_counts.device)[0].add_(other._sums_counts)

    def sums_counts(self) -> tuple[list[float], list[int]]:
        """Sum of losses in nats and number of tokens per bucket. Waits for the device."""
        if self._sums_counts is None:
            empty = len(self.edges) - 1
            return [0.0] * empty, [0] * empty
        sums, counts = self._sums_counts.tolist()
        return sums, [round(count) for count in counts]

    def by_bucket(self) -> dict[str, float | None]:
        """`means` by bucket; a key is such as "1024-2048". Waits for the device."""
        return dict(zip((f"{low}-{high}" for low, high in pairwise(self.edges)), self.means(), strict=True))

    def means(self) -> list[float | None]:
        """Mean loss in nats per bucket, None if it has no tokens. Waits for the device."""
        sums, counts = self.sums_counts()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
