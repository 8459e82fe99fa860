"""Perplexity by position: the result of a measurement, its file and its table.

    perplexity = exp(mean negative log-likelihood in nats per token)

per position bucket (`buckets.py`), over the same held-out sequences for every model. The row of a model that uses its
context falls; the row of a model that breaks beyond its trained length rises steeply there.

    position          0-64  64-128  128-256  256-512  512-1K
    base              31.0    22.4     19.8     58.1   240.3
    extended          33.2    23.0     20.1     18.7    17.2

A file contains one measurement as one JSON object, several as a list under `results`.

Perplexities are comparable only between models of one tokenizer: they are per token, not per character.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megalong.errors import UserError
from megalong.evaluation.buckets import bucket_labels
from megalong.runtime.folders import file_aside

FORMAT = "megalong-perplexity-1"


@dataclass(frozen=True)
class PerplexityResult:
    """One model measured at one sequence length.

    Attributes:
        name: name in tables and plots.
        source: the measured checkpoint or Hugging Face folder.
        data: prefixes of the datasets.
        seq_length: tokens per sequence.
        samples: number of sequences.
        edges: `n + 1` bucket edges, see `bucket_edges`.
        nll: `n` mean negative log-likelihoods in nats per token, None in an empty bucket.
        tokens: `n` numbers of measured tokens.
        text: name of the text in plots.
    """

    name: str
    source: str
    data: list[str]
    seq_length: int
    samples: int
    edges: list[int]
    nll: list[float | None]
    tokens: list[int]
    text: str = ""

    @property
    def perplexity(self) -> list[float | None]:
        """Perplexity per bucket."""
        return [None if value is None else _exp(value) for value in self.nll]

    @property
    def mean_nll(self) -> float:
        """Nats per token over all positions."""
        total = sum(value * count for value, count in zip(self.nll, self.tokens, strict=True) if value is not None)
        return total / sum(self.tokens)

    @property
    def mean_perplexity(self) -> float:
        """Perplexity over all positions."""
        return _exp(self.mean_nll)

    def save(self, path: Path) -> None:
        """Write this result with `save_results`."""
        save_results([self], path)

    @classmethod
    def load(cls, path: Path) -> PerplexityResult:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, was not written by `save`, or contains several models.
        """
        found = load_results(path)
        if len(found) > 1:
            raise UserError(f"{path}: contains {len(found)} models ({', '.join(one.name for one in found)}), not one")
        return found[0]


def save_results(results: Sequence[PerplexityResult], path: Path) -> None:
    """Write as JSON; the file is then complete or absent."""
    records = [{**asdict(one), "perplexity": one.perplexity} for one in results]
    whole = {"format": FORMAT, **(records[0] if len(records) == 1 else {"results": records})}
    with file_aside(path) as aside:
        aside.write_text(json.dumps(whole, indent=2) + "\n")


def load_results(path: Path) -> list[PerplexityResult]:
    """Read what `save_results` wrote; at least one result.

    Raises:
        UserError: the file is missing or was not written by `save_results`.
    """
    try:
        whole = json.loads(path.read_text())
        if whole.pop("format") != FORMAT:
            raise KeyError("format")
        records = whole.get("results", [whole])
        for record in records:
            record.pop("perplexity")
        return [PerplexityResult(**record) for record in records]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; 'megalong evaluate perplexity' writes it") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a result of 'megalong evaluate perplexity'; measure again") from None


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def perplexity_table(results: list[PerplexityResult]) -> str:
    """One row per model, one column per bucket, in Markdown that is also readable in a terminal.

    Raises:
        ValueError: the results have different buckets.
    """
    _require_same_buckets(results)
    rows = [["position", *bucket_labels(results[0].edges), "all"]]
    for result in results:
        cells = [_cell(value) for value in [*result.perplexity, result.mean_perplexity]]
        rows.append([result.name, *cells])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table of `rows` (the first is the header), columns padded, all but the first right-aligned."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:.3g}"


def _require_same_buckets(results: list[PerplexityResult]) -> None:
    if not results:
        raise ValueError("nothing to compare: no results given")
    for result in results[1:]:
        if result.edges != results[0].edges:
            raise ValueError(
                f"{result.name} was measured at {result.seq_length} tokens, {results[0].name} at "
                f"{results[0].seq_length}: only equal lengths are comparable"
            )
