"""The plot of `megalong data plan`: tokens by document length, before and after the rules, and the longest pieces.

Left, shares of tokens by doublings of the document's length: the datasets (pale) beside the run (strong), stacked by
domain. Right, the share of samples that contain at least so many consecutive tokens of one document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from megalong.data.length_plot import length_label, sparse
from megalong.planning.stage_plan import StagePlan
from megalong.plots import new_figure, save


def plot_plan(stage: StagePlan, path: Path) -> None:
    """Plot `stage` to the PNG `path`, which appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    names = [domain.share.name for domain in stage.domains]
    columns = max(1, min(5, 1280 // (100 + 8 * max(map(len, names)))))  # pixels of the picture / of a name
    figure = new_figure(12, 4.6 + 0.23 * -(-len(names) // columns))
    lengths, samples = figure.subplots(1, 2, width_ratios=[3, 2])
    _lengths(lengths, stage)
    _samples(samples, stage)
    # The legend is below both, because bars can reach any place inside.
    figure.legend(*lengths.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{stage.config.run.name}: {stage.samples:,} samples of {stage.config.data.seq_length:,} tokens")
    for axes in (lengths, samples):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _lengths(axes: Axes, stage: StagePlan) -> None:
    used = np.flatnonzero(sum(domain.stored.documents + domain.seen.documents for domain in stage.domains))
    doublings = np.arange(used[0], used[-1] + 1)
    colours = colormaps["tab10" if len(stage.domains) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for offset, pale, what in ((-0.21, True, "stored"), (0.21, False, "seen")):
        tokens = np.array([getattr(domain, what).tokens[doublings] for domain in stage.domains])
        tokens /= max(1.0, tokens.sum())
        below = np.zeros(len(doublings))
        for number, (domain, height) in enumerate(zip(stage.domains, tokens, strict=True)):
            axes.bar(doublings + offset, height, 0.4, bottom=below, color=colours[number % len(colours)],
                     alpha=0.4 if pale else 1.0, label=None if pale else domain.share.name)  # fmt: skip
            below += height
    axes.set_xticks(doublings, sparse([length_label(2 ** int(doubling)) for doubling in doublings]))
    axes.set_xlabel("tokens of a document, from … to the next mark")
    axes.set_title("tokens by length: pale in the datasets, strong in the run", fontsize=10)


def _samples(axes: Axes, stage: StagePlan) -> None:
    longest = np.sort(stage.longest)
    share = 1 - np.arange(len(longest)) / len(longest)
    axes.step([0.5, *longest, longest[-1]], [1, *share, 0], where="pre", color="#0072B2")
    axes.set_xscale("log", base=2)
    axes.set_xlim(max(1, longest[0] / 2), stage.config.data.seq_length * 1.1)
    axes.set_ylim(0, 1.05)
    ticks = [mark for mark in axes.get_xticks() if longest[0] / 2 <= mark <= stage.config.data.seq_length * 1.1]
    axes.set_xticks(ticks, sparse([length_label(int(mark)) for mark in ticks], 8))
    axes.minorticks_off()  # matplotlib labels them too if there are few major ones
    axes.set_xlabel("consecutive tokens of one document")
    axes.set_title("samples that contain at least so many", fontsize=10)
