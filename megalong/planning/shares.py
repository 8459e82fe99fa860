"""How evenly context-parallel ranks share a run's attention work, for each token layout.

Every rank has the same number of tokens, but a token late in a long document attends to more keys than an early one. A
step takes as long as its busiest rank, so the measure is that rank's pairs over the mean: 1.10 means that attention
takes 10 % longer than with perfect balance. The other cost is the number of contiguous runs into which a rank's tokens
are cut: more runs mean smaller blocks.

Needs no torch: layouts are plain numpy, and documents are read from the `.idx`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalong.attention.layout import Kind, Runs, TokenLayout, attended_pairs
from megalong.config.resolved import padded_length
from megalong.config.schema import Config
from megalong.data.samples.sampler import PackedSamples

KINDS: tuple[Kind, ...] = ("zigzag", "per_document_zigzag", "balanced")


@dataclass(frozen=True)
class Shared:
    """One layout over several samples.

    Attributes:
        pairs: float64 [samples, ranks], attended pairs of each rank over the mean of the sample.
        runs_per_rank: mean number of runs of consecutive tokens on a rank.
        first: every rank's runs in the first sample.
    """

    kind: Kind
    pairs: np.ndarray
    runs_per_rank: float
    first: list[Runs]


def shares(config: Config, samples: int) -> tuple[list[Shared], list[np.ndarray], int]:
    """Evaluate every layout on the first samples of a run.

    Returns:
        (one `Shared` per layout, starts of documents in each sample, tokens of a sample padded for the ranks)
    """
    ranks = config.parallel.context_parallel_size
    rows = _documents(config, samples)
    length = padded_length(config)
    return [_shared(TokenLayout(ranks, kind, window(config)), length, rows) for kind in KINDS], rows, length


def window(config: Config) -> int | None:
    """The widest attention window in the configuration. Models that it loads are not read."""
    attention, architecture = config.attention, config.model.architecture
    if architecture is not None:
        return architecture.with_window(attention.window_size, attention.window_attn_skip_freq).widest_window
    return attention.window_size if attention.window_attn_skip_freq is None else None


def _documents(config: Config, samples: int) -> list[np.ndarray]:
    if not config.data.masked:
        return [np.zeros(1, np.int64)] * samples
    packed = PackedSamples.of(config)
    rows = [packed.read(k).documents for k in range(samples)]
    return [starts[starts < config.data.seq_length] for starts in rows]


def _shared(layout: TokenLayout, length: int, rows: list[np.ndarray]) -> Shared:
    placed = [layout.runs(length, starts) for starts in rows]
    pairs = np.array(
        [
            [attended_pairs(runs, starts, layout.window) for runs in sample]
            for sample, starts in zip(placed, rows, strict=True)
        ],
        np.float64,
    )
    runs = float(np.mean([len(runs) for sample in placed for runs in sample]))
    return Shared(layout.kind, pairs / pairs.mean(1, keepdims=True), runs, placed[0])
