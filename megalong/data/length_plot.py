"""Plot of a length histogram: for each doubling of the length, the share of documents and the share of tokens.

Both are shown because they differ: most documents of a crawl are short, and most tokens of a long-context corpus are in
few long ones. Drawn on matplotlib's Agg canvas without pyplot: no display, no global state.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from megalong.data.lengths import Bucket
from megalong.errors import UserError
from megalong.plots import new_figure, save


def plot_lengths(buckets: list[Bucket], title: str, path: Path) -> None:
    """Plot `buckets` to the PNG `path`, which appears whole or not at all.

    Raises:
        UserError: there is nothing to plot, or the file cannot be written.
    """
    if not buckets:
        raise UserError(f"--png: {title} contains no tokens, so there is no length to plot; leave the flag out")
    figure = new_figure(8, 4.2)
    axes = figure.add_subplot()
    places = range(len(buckets))
    for offset, counted, colour in ((-0.2, "documents", "#0072B2"), (0.2, "tokens", "#D55E00")):
        total = sum(bucket[counted] for bucket in buckets)
        shares = [bucket[counted] / total for bucket in buckets]
        axes.bar([place + offset for place in places], shares, 0.4, color=colour, label=f"share of {total:,} {counted}")
    axes.set_xticks(list(places), sparse([length_label(bucket["from"]) for bucket in buckets]))
    axes.set_xlabel("tokens of a document, from … to the next mark")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def sparse(labels: Sequence[str], most: int = 12) -> list[str]:
    """Keep every n-th of `labels`, at most `most` of them, so that none overlap; the others become empty."""
    step = -(-len(labels) // most)
    return ["" if place % step else label for place, label in enumerate(labels)]


def length_label(length: int) -> str:
    """1024 → 1K."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)
