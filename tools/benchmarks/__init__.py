"""One module per benchmark; each has `run() -> Report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """The result of a benchmark: figures for tools, a table for people."""

    figures: dict[str, float]
    table: str
