"""`megalong data balance`: how evenly the ranks of a context-parallel group share a run's attention, layout by layout.

Every rank holds the same number of tokens, but a token late in a long document attends to more keys than an early one.
The step takes as long as the fullest rank, so what counts is its pairs over the mean: 1.10 is a tenth of attention's
time spent waiting. The other price is the number of runs a rank's tokens are cut into, which makes small blocks.

Needs no torch: layouts are plain numpy, and documents are read from the `.idx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalong.attention.layout import Kind, Runs, TokenLayout, attended_pairs
from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.data.sampler import PackedSamples
from megalong.errors import UserError
from megalong.runtime.folders import one_each, refuse_overwriting

KINDS: tuple[Kind, ...] = ("zigzag", "per_document_zigzag", "balanced")


@dataclass(frozen=True)
class Shared:
    """One layout over several samples.

    Attributes:
        pairs: of each rank, float64 [samples, ranks], over the mean of its sample.
        runs_per_rank: mean number of runs of consecutive tokens on a rank.
        first: every rank's runs of the first sample.
    """

    kind: Kind
    pairs: np.ndarray
    runs_per_rank: float
    first: list[Runs]


def balance(
    config_file: str, overrides: Sequence[str] = (), samples: int = 8, png: str | None = None, overwrite: bool = False
) -> None:
    """Print a table of the layouts for the first samples of a run, and draw it.

    Args:
        samples: how many to look at.
        png: where to draw the picture, with the stage's name where there are several; None draws none.
        overwrite: draw over pictures that are there.

    Raises:
        UserError: a bad configuration or dataset, one context-parallel rank, samples below 1, an unwritable picture.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: at least 1 sample must be looked at")
    stages = load_config(config_file, list(overrides))
    for config in stages:
        if config.parallel.context_parallel_size == 1:
            raise UserError(
                "parallel.context_parallel_size 1: one rank has all of the attention, there is nothing to share; "
                "append parallel.context_parallel_size=8"
            )
    pictures = one_each(png, [config.run.name for config in stages])
    refuse_overwriting(pictures, "--png", overwrite)
    for number, config in enumerate(stages):
        _one_run(config, samples, pictures[number] if pictures else None)


def _one_run(config: Config, samples: int, png: Path | None) -> None:
    ranks = config.parallel.context_parallel_size
    rows = _documents(config, samples)
    length = -(-config.data.seq_length // (2 * ranks)) * 2 * ranks
    shared = [_shared(TokenLayout(ranks, kind, _window(config)), length, rows) for kind in KINDS]
    print(f"{config.run.name}: {_table(config, shared, rows, length)}")
    if png is not None:
        from megalong.attention.balance_plot import plot_balance

        plot_balance(shared, rows[0], length, png)
        print(f"picture: {png}")


def _window(config: Config) -> int | None:
    """The window that most attention is computed in, as far as the configuration tells: no loaded model is read."""
    attention, architecture = config.attention, config.model.architecture
    if architecture is not None:
        return architecture.with_window(attention.window_size, attention.window_attn_skip_freq).widest_window
    return attention.window_size if attention.window_attn_skip_freq is None else None


def _documents(config: Config, samples: int) -> list[np.ndarray]:
    if not config.data.masked:
        return [np.zeros(1, np.int64)] * samples
    data = config.data
    packed = PackedSamples(
        data.mixture, data.seq_length, config.run.seed, data.split, separator=data.separator, packing=data.packing
    )
    rows = [packed.bounds(k) for k in range(samples)]
    return [starts[starts < data.seq_length] for starts in rows]


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


def _table(config: Config, shared: list[Shared], rows: list[np.ndarray], length: int) -> str:
    parallel, chosen = config.parallel, config.token_layout
    documents, window = np.mean([len(starts) for starts in rows]), _window(config)
    lines = [
        f"{len(rows)} samples of {length:,} tokens, {config.data.packing} packing ({documents:,.1f} masked documents a "
        f"sample), {parallel.context_parallel_size} context-parallel ranks, pairs counted in "
        f"{'full attention' if window is None else f'a window of {window}'}",
        "",
        f"{'layout':22}{'fullest rank / mean':>21}{'worst sample':>14}{'runs a rank':>13}",
    ]
    for one in shared:
        fullest = one.pairs.max(1)
        mark = "  <- this run's" if one.kind == chosen else ""
        lines.append(f"{one.kind:22}{fullest.mean():21.3f}{fullest.max():14.3f}{one.runs_per_rank:13,.1f}{mark}")
    return "\n".join(lines)
