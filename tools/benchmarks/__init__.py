"""One module a benchmark; each has `run() -> Report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What a benchmark found: figures for tools, a table for people."""

    figures: dict[str, float]
    table: str
