"""`megalong data balance`: a table and a plot of how evenly each token layout divides a run's attention work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.planning.shares import Shared, shares, window
from megalong.runtime.folders import one_each, refuse_overwriting


def balance(
    config_file: str, overrides: Sequence[str] = (), samples: int = 8, png: str | None = None, overwrite: bool = False
) -> None:
    """Print a table of the layouts for the first samples of a run, and plot it.

    Args:
        samples: how many samples to evaluate.
        png: where to plot, with the stage's name added if there are several; None: no plot.
        overwrite: overwrite existing pictures.

    Raises:
        UserError: a bad configuration or dataset, one context-parallel rank, samples below 1, an unwritable picture.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: at least 1 sample is needed")
    stages = load_config(config_file, list(overrides))
    for config in stages:
        if config.parallel.context_parallel_size == 1:
            raise UserError(
                "parallel.context_parallel_size 1: one rank does all of the attention, there is nothing to share; "
                "append parallel.context_parallel_size=8"
            )
    pictures = one_each(png, [config.run.name for config in stages])
    refuse_overwriting(pictures, "--png", overwrite)
    for number, config in enumerate(stages):
        _one_run(config, samples, pictures[number] if pictures else None)


def _one_run(config: Config, samples: int, png: Path | None) -> None:
    shared, rows, length = shares(config, samples)
    print(f"{config.run.name}: {_table(config, shared, rows, length)}")
    if png is not None:
        from megalong.planning.balance_plot import plot_balance  # matplotlib is slow to import

        plot_balance(shared, rows[0], length, png)
        print(f"picture: {png}")


def _table(config: Config, shared: list[Shared], rows: list[np.ndarray], length: int) -> str:
    parallel, chosen = config.parallel, config.token_layout
    documents, reach = np.mean([len(starts) for starts in rows]), window(config)
    lines = [
        f"{len(rows)} samples of {length:,} tokens, {config.data.packing} packing ({documents:,.1f} masked documents a "
        f"sample), {parallel.context_parallel_size} context-parallel ranks, pairs counted in "
        f"{'full attention' if reach is None else f'a window of {reach}'}",
        "",
        f"{'layout':22}{'busiest rank / mean':>21}{'worst sample':>14}{'runs per rank':>15}",
    ]
    for one in shared:
        busiest = one.pairs.max(1)
        mark = "  <- this run's" if one.kind == chosen else ""
        lines.append(f"{one.kind:22}{busiest.mean():21.3f}{busiest.max():14.3f}{one.runs_per_rank:15,.1f}{mark}")
    return "\n".join(lines)
