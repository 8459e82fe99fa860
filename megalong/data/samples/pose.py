"""PoSE (arXiv 2309.10400): positions that skip ahead, so that a model trained on L tokens sees distances up to T.

The tokens of a sample do not change, and attention stays causal over all of them; only positions change. The sample is
cut into N chunks at random places. The positions of chunk i are shifted by u_i, where u_0 = 0 and u_i is drawn from
u_{i-1} to T - L:

    L = 8, T = 32, 2 chunks     0 1 2 | 20 21 22 23 24

Positions ascend, stay below T, and are consecutive inside a chunk. If documents or packs are masked from each other,
each is cut and shifted separately, with its own length as L; one shorter than N tokens is not changed.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

PURPOSE = 0x506F5345  # "PoSE"; separates this use of the run's seed from all others


class PoseSettings(Protocol):
    """`data.pose`."""

    @property
    def target_length(self) -> int: ...
    @property
    def chunks(self) -> int: ...


def skipped_positions(starts: np.ndarray, length: int, settings: PoseSettings, seed: int, k: int) -> np.ndarray:
    """int64 [length]: the positions of sample k.

    Args:
        starts: int64, ascending from 0: where positions restart.
    """
    # A seed of nine numbers; those of streams, samples and tasks have fewer.
    parts = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, k & 0xFFFFFFFF, k >> 32, PURPOSE, 0, 0, 0, 0)
    random = np.random.RandomState(list(parts))
    begins = starts[starts < length]
    positions = np.arange(length) - np.repeat(begins, np.diff(np.append(begins, length)))
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), length], strict=True):
        tokens = end - begin
        if tokens < settings.chunks:
            continue
        cuts = np.sort(random.choice(tokens - 1, settings.chunks - 1, replace=False)) + 1
        ahead, room = 0, settings.target_length - tokens
        for first, stop in zip(cuts.tolist(), [*cuts[1:].tolist(), tokens], strict=True):
            ahead = int(random.randint(ahead, room + 1))
            positions[begin + first : begin + stop] += ahead
    return positions
