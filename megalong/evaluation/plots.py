"""The picture of an extension: perplexity against position, one line a model.

Both axes are logarithmic: positions double from bucket to bucket, and a model beyond its length is not a little worse
but many times. A point sits at the geometric middle of its bucket (the first, which starts at 0, as if it too began at
half its end). A dashed line marks the length the base model was trained at.

Drawn on matplotlib's Agg canvas without pyplot: no display, no global state, safe inside a training process.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from megalong.evaluation.buckets import bucket_labels
from megalong.evaluation.perplexity import PerplexityResult

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ["#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000"]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]


def plot_perplexity(
    results: list[PerplexityResult],
    path: Path,
    *,
    title: str = "Perplexity by position",
    original_length: int | None = None,
) -> None:
    """Draw `results` (same buckets, at most seven) into the PNG `path`, which appears whole or not at all.

    Args:
        original_length: where to draw the line "trained length of the base model"; None draws none.
    """
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for result, colour, marker in zip(results, _COLOURS, _MARKERS, strict=False):
        points = [(x, y) for x, y in zip(_middles(result.edges), result.perplexity, strict=True) if y is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=6, linewidth=2, label=result.name)
        last_x, last_y = points[-1]
        axes.annotate(f"  {last_y:.3g}", (last_x, last_y), color=colour, va="center", fontsize=9)
    _scale(axes, results)
    if original_length is not None:
        axes.axvline(original_length, color="0.35", linestyle="--", linewidth=1.2)
        axes.annotate(
            f" trained to {original_length}",
            (original_length, 0.985),
            xycoords=("data", "axes fraction"),
            va="top",
            color="0.35",
            fontsize=9,
        )
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("perplexity of held-out text (lower is better)")
    axes.grid(True, which="major", color="0.88")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.94))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    figure.savefig(aside, format="png")
    aside.replace(path)


def _middles(edges: list[int]) -> list[float]:
    return [edges[1] / math.sqrt(2), *(math.sqrt(low * high) for low, high in pairwise(edges[1:]))]


def _scale(axes: Axes, results: list[PerplexityResult]) -> None:
    """Logarithmic axes with a tick under every bucket and readable numbers at the side."""
    edges = results[0].edges
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_middles(edges)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(bucket_labels(edges))
    values = [value for result in results for value in result.perplexity if value is not None and math.isfinite(value)]
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.25, max(values) * 1.6)
    axes.yaxis.set_major_locator(FixedLocator(_round_numbers(min(values), max(values))))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around the range, thinned to whole decades where that would be more than nine."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    chosen = [value for value in fine if low / 1.25 <= value <= high * 1.6]
    return chosen if len(chosen) <= 9 else [10.0**decade for decade in decades]
