"""Plots for files: figures on matplotlib's Agg canvas without pyplot, so without a display and global state."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalong.errors import UserError
from megalong.runtime.folders import file_aside


def new_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """An empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, option: str = "--png") -> None:
    """Write a figure to the PNG `path`, which is then complete or absent.

    Args:
        option: the command-line option for `path`, for the error message.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with file_aside(path) as aside:
            figure.savefig(aside, format="png")
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written ({error.strerror}); give another path") from None
