"""Which tokens of a sample a rank reads: its own, each with the one behind it, and no others.

A rank's tokens are runs of consecutive ones, and the label of a token is the token behind it. So a run [a, b) is read
as tokens a to b, both included: one more than it holds.

    S = 16, CP 2, zigzag, rank 0      holds  0 1 2 3  12 13 14 15        reads  0 1 2 3 4  12 13 14 15 16

A rank reads S/CP tokens and one more for each of its runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megalong.attention.layout import Runs, TokenLayout
from megalong.attention.plan import AttentionPlan, SequencePlan, make_plan
from megalong.config.resolved import padded
from megalong.data.samples.sample import Sample, SampleSource


@dataclass(frozen=True)
class ContextShard:
    """One context-parallel rank's part of every sample.

    Attributes:
        layout: how tokens lie on context-parallel ranks.
        context_rank: this rank's index in the context-parallel group.
        masked: whether documents are kept from seeing each other.
        multiple: what the padded length must be a multiple of besides `layout.multiple`.
    """

    layout: TokenLayout
    context_rank: int = 0
    masked: bool = False
    multiple: int = 1

    def padded(self, length: int) -> int:
        """Tokens of a padded sample that trains on `length`."""
        return padded(length, self.layout.multiple, self.multiple)

    def plan(self, rows: list[Sample]) -> AttentionPlan:
        """Where the tokens of a micro-batch of `rows` lie, and what they see."""
        length = len(rows[0].tokens) - 1
        return make_plan(self.layout, self.padded(length), [self._starts(row, length) for row in rows])

    def runs(self, sequence: SequencePlan) -> Runs:
        """This rank's runs of a padded sample."""
        return sequence.shards[self.context_rank].runs

    def read(self, sample: Sample, runs: Runs, dtype: np.dtype[Any]) -> np.ndarray:
        """Tokens of `runs` as `read_spans` lays them out: dtype [S/CP without padding + runs]."""
        spans = read_spans(runs, len(sample.tokens) - 1)
        out, begin = np.empty(sum(end - first for first, end in spans), dtype), 0
        for first, end in spans:
            sample.copy_tokens(first, out[begin : begin + end - first])
            begin += end - first
        return out

    def read_alone(self, dtype: np.dtype[Any], source: SampleSource, k: int) -> np.ndarray:
        """As `read`, of sample k of `source`, for a process that has no plan of the micro-batch."""
        sample = source.read(k)
        length = len(sample.tokens) - 1
        runs = self.layout.runs(self.padded(length), self._starts(sample, length))[self.context_rank]
        return self.read(sample, runs, dtype)

    def _starts(self, row: Sample, length: int) -> np.ndarray:
        """First tokens of the documents of a padded sample, padding being the last of them."""
        padding = np.array([length] if self.padded(length) > length else [], np.int64)
        if not self.masked:
            return np.append(np.zeros(1, np.int64), padding)
        return np.append(row.documents[row.documents < length], padding)


def read_spans(runs: Runs, length: int) -> list[tuple[int, int]]:
    """The tokens to read of a sample for a rank that holds `runs`: (first, the one behind the last), run by run.

    Args:
        length: tokens S the sample trains on; what lies behind is padding and is not read.
    """
    return [(first, min(stop, length) + 1) for first, stop in runs.tolist() if first < length]
