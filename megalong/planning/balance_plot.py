"""The plot of `megalong data balance`: which rank has which tokens of the first sample, and the work of each rank.

Left, one strip per layout: the sequence from its first to its last token, coloured by rank, with a tick where a
document begins. Right: attended pairs of each rank over the mean, so bars of equal height are equal work.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megalong.planning.shares import Shared
from megalong.plots import new_figure, save

COLUMNS = 2048


def plot_balance(shared: list[Shared], starts: np.ndarray, length: int, path: Path) -> None:
    """Plot `shared` to the PNG `path`, which appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    figure = new_figure(11, 1.6 * len(shared) + 0.6)
    grid = figure.subplots(len(shared), 2, width_ratios=[3, 1], squeeze=False)
    highest = max(float(one.pairs[0].max()) for one in shared)
    for one, (strip, bars) in zip(shared, grid, strict=True):
        _strip(strip, one, starts, length)
        _bars(bars, one, highest)
    grid[-1][0].set_xlabel(f"token of the first sample (of {length:,}); ticks: documents begin")
    grid[-1][1].set_xlabel("rank")
    save(figure, path)


def _strip(axes: Axes, one: Shared, starts: np.ndarray, length: int) -> None:
    owner = np.zeros(COLUMNS)
    for rank, runs in enumerate(one.first):
        columns = np.ceil(runs * COLUMNS / length).astype(int)
        for first, last in columns:
            owner[first:last] = rank
    axes.imshow(owner[None], aspect="auto", extent=(0, length, 0, 1), cmap=_colours(len(one.first)),
                interpolation="nearest", vmin=-0.5, vmax=len(one.first) - 0.5)  # fmt: skip
    axes.set_xticks(starts, labels=[], minor=False)
    axes.set_yticks([])
    axes.set_title(one.kind, loc="left", fontsize=10)


def _bars(axes: Axes, one: Shared, highest: float) -> None:
    ranks = np.arange(one.pairs.shape[1])
    axes.bar(ranks, one.pairs[0], color=_colours(len(ranks))(ranks / max(1, len(ranks) - 1)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(0, 1.05 * highest)
    axes.set_title(f"pairs / mean, busiest {one.pairs[0].max():.3f}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(ranks: int):  # type: ignore[no-untyped-def]
    return colormaps["viridis"].resampled(ranks)
