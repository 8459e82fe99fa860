"""Which tokens of a sequence lie on which context-parallel rank: one answer for loader, positions and attention.

Under a causal mask late tokens attend to more keys than early ones, so contiguous shards would leave the first ranks
idle. Every layout gives each of n ranks the same number of tokens and about the same number of attended pairs. A rank's
tokens form runs of consecutive tokens, in order:

    zigzag               2n equal chunks, rank r holds chunks r and 2n-1-r:
                         n = 2, 16 tokens     rank 0: 0 1 2 3  12 13 14 15      rank 1: 4 5 6 7  8 9 10 11
    per_document_zigzag  the same cut for every document: exact for any documents, each of which lies on all ranks
    balanced             equal tiles, assigned by the number of pairs their tokens attend to: nearly exact for
                         documents, and a rank's runs are long, which makes few and large blocks

A document's length need not be divisible: remaining tokens go to the ranks in turn, one token each.
Sources: zigzag as in public ring attention implementations; the other two follow from counting pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megalong.config.resolved import layout_multiple

Kind = Literal["zigzag", "per_document_zigzag", "balanced"]
Runs = np.ndarray  # int64 [r, 2]: first token and the token after the last, ascending
TILES = (2, 4, 8, 16, 32, 64)  # tiles per rank of a balanced sequence, fewest first
EVEN_ENOUGH = 1.02  # load of the busiest rank over the mean


@dataclass(frozen=True)
class TokenLayout:
    """A way of distributing sequences over n = `context_parallel_size` ranks.

    `window` is the sliding window that attended pairs are counted with, None for the whole document.
    """

    context_parallel_size: int = 1
    kind: Kind = "zigzag"
    window: int | None = None

    @property
    def multiple(self) -> int:
        """Sequences must be a multiple of this many tokens; shorter ones are padded (`batches.micro_batch`)."""
        return layout_multiple(self.context_parallel_size)

    def runs(self, seq_length: int, starts: np.ndarray) -> list[Runs]:
        """Every rank's runs of one sequence.

        Args:
            seq_length: tokens of the whole sequence, a multiple of `multiple`.
            starts: int64, first tokens of its documents, ascending from 0.
        """
        assert seq_length % self.multiple == 0
        if self.context_parallel_size == 1:
            return [np.array([[0, seq_length]], np.int64)]
        if self.kind == "zigzag":
            return _zigzag(np.array([0]), seq_length, self.context_parallel_size)
        if self.kind == "per_document_zigzag":
            return _zigzag(starts, seq_length, self.context_parallel_size)
        return _balanced(starts, seq_length, self.context_parallel_size, self.window)


def tokens_of(runs: Runs) -> np.ndarray:
    """The tokens of `runs` as positions in the sequence, in order: int64."""
    lengths = runs[:, 1] - runs[:, 0]
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(runs[:, 0] - offsets, lengths) + np.arange(lengths.sum())


def union(runs: list[Runs]) -> Runs:
    """The runs of all tokens of several ranks."""
    together = np.concatenate(runs)
    return _merge_adjacent(together[np.argsort(together[:, 0])])


def attended_pairs(runs: Runs, starts: np.ndarray, window: int | None = None) -> int:
    """Number of pairs of a query in `runs` and a key it sees: causal, in its document, at most `window` keys."""
    tokens = tokens_of(runs)
    return int(_keys_seen(tokens, starts, window).sum())


def _keys_seen(tokens: np.ndarray, starts: np.ndarray, window: int | None) -> np.ndarray:
    seen = tokens - starts[np.searchsorted(starts, tokens, side="right") - 1] + 1
    return seen if window is None else np.minimum(seen, window)


def _zigzag(starts: np.ndarray, seq_length: int, n: int) -> list[Runs]:
    """Chunks r and 2n-1-r of every document for rank r; remainders rotate: ranks differ by at most one token."""
    lengths = np.diff(starts, append=seq_length)
    base, rest = np.divmod(lengths, 2 * n)
    turn = (np.cumsum(rest) - rest) % n  # the first rank to get a token of a document's remainder
    place = (np.arange(n) - turn[:, None]) % n  # how many ranks are served before rank r
    early = base[:, None] + (place < rest[:, None])
    late = base[:, None] + (place + n < rest[:, None])
    sizes = np.concatenate((early, late[:, ::-1]), axis=1)
    ends = starts[:, None] + np.cumsum(sizes, axis=1)
    chunks = np.stack((ends - sizes, ends), axis=-1)
    return [_merge_adjacent(chunks[:, [r, 2 * n - 1 - r]].reshape(-1, 2)) for r in range(n)]


def _balanced(starts: np.ndarray, seq_length: int, n: int, window: int | None) -> list[Runs]:
    """The fewest tiles that make loads even enough, because a rank computes more blocks the more runs it has."""
    seen = _keys_seen(np.arange(seq_length), starts, window)
    best: tuple[float, np.ndarray] | None = None
    for per_rank in TILES:
        size = seq_length // (n * per_rank)
        if size == 0:
            break
        pairs = seen[: size * n * per_rank].reshape(n * per_rank, size).sum(1)
        owner = _assign_tiles(pairs, n, per_rank)
        uneven = float(np.bincount(owner, pairs, n).max() * n / pairs.sum())
        if best is None or uneven < best[0]:
            best = uneven, owner
        if uneven <= EVEN_ENOUGH:
            break
    assert best is not None
    owner = best[1]
    size = seq_length // len(owner)
    tiles = np.arange(len(owner))[:, None] * size + np.array([0, size])
    # The tokens after the last tile, at most a few dozen per rank, are cut in equal pieces.
    rest, begin = (seq_length - size * len(owner)) // n, size * len(owner)
    tails = begin + np.arange(n)[:, None] * rest + np.array([0, rest])
    return [_merge_adjacent(np.concatenate((tiles[owner == rank], tails[rank : rank + 1]))) for rank in range(n)]


def _assign_tiles(pairs: np.ndarray, n: int, per_rank: int) -> np.ndarray:
    """The rank of each tile: heaviest tile first, each to the rank with room and the fewest pairs so far."""
    owner = np.empty(len(pairs), np.int64)
    load, room = np.zeros(n), np.full(n, per_rank)
    for tile in np.argsort(-pairs, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, load, np.inf)))
        owner[tile] = rank
        load[rank] += pairs[tile]
        room[rank] -= 1
    _swap_tiles(owner, pairs, load)
    return owner


def _swap_tiles(owner: np.ndarray, pairs: np.ndarray, load: np.ndarray) -> None:
    """Swap tiles between the busiest and the least busy rank as long as this brings them closer."""
    for _ in range(4 * len(owner)):
        most, least = int(np.argmax(load)), int(np.argmin(load))
        gap = load[most] - load[least]
        busy, idle = np.flatnonzero(owner == most), np.flatnonzero(owner == least)
        moved = pairs[busy][:, None] - pairs[idle]
        after = np.abs(gap - 2 * moved)
        best = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[best] >= gap:
            return
        give, take = busy[best[0]], idle[best[1]]
        owner[give], owner[take] = least, most
        load[most] -= moved[best]
        load[least] += moved[best]


def _merge_adjacent(runs: Runs) -> Runs:
    """`runs` without empty ones, and with adjacent ones merged."""
    runs = runs[runs[:, 1] > runs[:, 0]]
    first = np.append(True, runs[1:, 0] != runs[:-1, 1]) if len(runs) else np.zeros(0, bool)
    last = np.append(first[1:], True) if len(runs) else first
    return np.stack((runs[first, 0], runs[last, 1]), axis=1)
