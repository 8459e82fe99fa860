"""How the tokens of a sequence lie on context-parallel ranks, and which of them see which.

Under a causal mask late tokens attend to more keys than early ones, so contiguous shards would leave the first ranks
idle. Zigzag cuts the sequence into 2n chunks and gives rank r one early and one late chunk, r and 2n-1-r:

    n = 2, 16 tokens     rank 0: 0 1 2 3  12 13 14 15      rank 1: 4 5 6 7  8 9 10 11

On each rank positions grow, so a rank's attention to its own keys is plain causal. Between two ranks nothing needs a
mask, and every block is half of what it would be unmasked, so that all ranks have equal work in every step:

    keys of an earlier rank   all queries        x first half of the keys
    keys of a later rank      second half        x all keys
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalong.errors import UserError


@dataclass(frozen=True)
class Block:
    """The part of attention between one rank's queries and another's keys that the causal mask leaves."""

    queries: slice
    keys: slice
    causal: bool  # of equal numbers of queries and keys; without it every query sees every key


@dataclass(frozen=True)
class ZigzagLayout:
    """Chunks r and 2n-1-r of every sequence lie on rank r of n = `context_parallel_size`."""

    context_parallel_size: int

    def check(self, seq_length: int) -> None:
        """Raise `UserError` unless sequences of `seq_length` tokens can be cut into 2n equal chunks."""
        chunks = self._chunks
        if seq_length < 1 or seq_length % chunks:
            nearest = max(1, round(seq_length / chunks)) * chunks
            raise UserError(
                f"data.seq_length: {seq_length} cannot be cut into {chunks} equal chunks, two for each of "
                f"{self.context_parallel_size} context-parallel ranks; write {nearest}"
            )

    def indices(self, seq_length: int, rank: int) -> torch.Tensor:
        """Positions in the sequence of rank `rank`'s tokens, in their order there: int64 `[seq_length / n]`."""
        self.check(seq_length)
        if self.context_parallel_size == 1:
            return torch.arange(seq_length)
        length = seq_length // self._chunks
        early, late = rank * length, (self._chunks - 1 - rank) * length
        return torch.cat((torch.arange(early, early + length), torch.arange(late, late + length)))

    def gather(self, pieces: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """The whole sequence along `dim` from every rank's piece of it, rank 0's first."""
        total = sum(piece.shape[dim] for piece in pieces)
        order = torch.cat([self.indices(total, rank) for rank in range(self.context_parallel_size)])
        return torch.cat(tuple(pieces), dim).index_select(dim, order.argsort().to(pieces[0].device))

    def visible(self, length: int, rank: int, source: int) -> Block:
        """What `rank`'s queries see of `source`'s keys, as slices of the `length` tokens each of them holds."""
        whole, half = slice(None), length // 2
        if source == rank:
            return Block(whole, whole, causal=True)
        if source < rank:
            return Block(whole, slice(half), causal=False)
        return Block(slice(half, None), whole, causal=False)

    @property
    def _chunks(self) -> int:
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size
