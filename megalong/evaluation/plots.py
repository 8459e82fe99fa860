"""Plot perplexity against position, one line per model.

Both axes are logarithmic: positions double from bucket to bucket, and a model beyond its length is many times worse. A
point is at the geometric middle of its bucket (the first bucket starts at 0 and is treated as if it started at half its
end). A dashed line marks the length that the base model was trained on. The axis names the text.

Ticks are round numbers. In a wide range they are the same in every decade; in a narrow one they are evenly spaced, so
that the axis shows the difference between 2.6 and 3.6.

Drawn on matplotlib's Agg canvas without pyplot: no display, no global state, safe in a training process.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megalong.evaluation.buckets import bucket_labels
from megalong.evaluation.perplexity import PerplexityResult
from megalong.plots import new_figure, save

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ["#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000"]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
_WIDE = 5  # if high / low is at least this, ticks are at the same numbers in every decade


def plot_perplexity(
    results: Sequence[PerplexityResult],
    path: Path,
    *,
    title: str = "Perplexity by position",
    original_length: int | None = None,
) -> None:
    """Draw `results` (same buckets) into the PNG `path`, which is then complete or absent.

    Args:
        original_length: trained length of the base model, for the dashed line; None draws none.
    """
    # Infinite and missing values cannot be drawn.
    drawn = [
        [(x, y) for x, y in zip(_middles(one.edges), one.perplexity, strict=True) if y is not None and math.isfinite(y)]
        for one in results
    ]
    values = [y for points in drawn for _, y in points] or [1.0]
    low, high = _range(min(values), max(values))
    columns = 1 if max(len(one.name) for one in results) > 30 else 3
    rows = -(-len(results) // columns)
    figure = new_figure(8, 4.4 + 0.22 * rows)
    axes = figure.add_subplot()
    colours, heights = cycle(_COLOURS), _apart([points[-1][1] if points else None for points in drawn], low, high)
    for number, (result, points, height) in enumerate(zip(results, drawn, heights, strict=True)):
        colour, marker = next(colours), _MARKERS[number % len(_MARKERS)]
        style = ("-", "--", ":", "-.")[number // len(_COLOURS) % 4]
        label = result.name if points else f"{result.name} (infinite)"
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=2, linestyle=style, label=label)
        if height is not None:
            axes.annotate(f"  {points[-1][1]:.3g}", (xs[-1], height), color=colour, va="center", fontsize=9)
    _scale(axes, results[0].edges, low, high)
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
    axes.set_ylabel(_label(results))
    axes.grid(True, which="major", color="0.88")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper left", ncols=columns)
    save(figure, path, "--output")


def _label(results: Sequence[PerplexityResult]) -> str:
    """The label of the vertical axis with the name of the text, wrapped to the length of the axis."""
    texts = dict.fromkeys(one.text or ", ".join(Path(data).name for data in one.data) for one in results)
    name = "; ".join(text for text in texts if text)
    return textwrap.fill(f"perplexity{' of ' if name else ''}{name} (lower is better)", 42)


def _middles(edges: list[int]) -> list[float]:
    return [edges[1] / math.sqrt(2), *(math.sqrt(low * high) for low, high in pairwise(edges[1:]))]


def _range(least: float, most: float) -> tuple[float, float]:
    """The ends of the axis, with some room at both, even if all values are the same."""
    room = max((most / least) ** 0.08, 1.02)
    return least / room, most * room


def _apart(last: Sequence[float | None], low: float, high: float) -> list[float | None]:
    """The height of each line's last value as text: at the line's end, moved up if it would overlap another."""
    gap = (high / low) ** 0.05
    places: list[float | None] = [None] * len(last)
    floor = 0.0
    for number in sorted((n for n, value in enumerate(last) if value is not None), key=lambda n: last[n] or 0.0):
        places[number] = floor = max(last[number] or 0.0, floor)
        floor *= gap
    return places


def _scale(axes: Axes, edges: list[int], low: float, high: float) -> None:
    """Set logarithmic axes, with a tick under every bucket and readable numbers on the vertical axis."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_middles(edges)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(_middles(edges)[0] / 1.25, _middles(edges)[-1] * 1.25)
    axes.set_xticklabels(bucket_labels(edges))
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def ticks(low: float, high: float) -> list[float]:
    """4 to 12 round numbers from `low` to `high`."""
    if high / low < _WIDE:
        even = MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(value) for value in even if low <= value <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = -(-len(decades) // 12)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        chosen = [step * 10.0**decade for decade in decades[::every] for step in steps]
        chosen = [value for value in chosen if low <= value <= high]
        if len(chosen) <= 12:
            break
    return chosen
