"""Which tokens of a sample a rank reads: its own tokens and the token after each of its runs.

A rank's tokens are runs of consecutive tokens, and the label of a token is the token after it. So for a run [a, b) the
rank reads tokens a to b, both included: one more than the run has.

    S = 16, CP 2, zigzag, rank 0      holds  0 1 2 3  12 13 14 15        reads  0 1 2 3 4  12 13 14 15 16

A rank reads S/CP tokens, and one more for each of its runs.
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
        layout: which tokens lie on which context-parallel rank.
        context_rank: this rank's index in the context-parallel group.
        masked: whether documents are masked from each other.
        multiple: the padded length must be a multiple of this and of `layout.multiple`.
    """

    layout: TokenLayout
    context_rank: int = 0
    masked: bool = False
    multiple: int = 1

    def padded(self, length: int) -> int:
        """Padded length of a sample that trains on `length` tokens."""
        return padded(length, self.layout.multiple, self.multiple)

    def plan(self, rows: list[Sample]) -> AttentionPlan:
        """The plan of a micro-batch of `rows`: which rank has which tokens, and what they see."""
        length = len(rows[0].tokens) - 1
        return make_plan(self.layout, self.padded(length), [self._starts(row, length) for row in rows])

    def runs(self, sequence: SequencePlan) -> Runs:
        """This rank's runs of a padded sample."""
        return sequence.shards[self.context_rank].runs

    def read(self, sample: Sample, runs: Runs, dtype: np.dtype[Any]) -> np.ndarray:
        """Tokens of `runs`, by `read_spans`: dtype [S/CP without padding + number of runs]."""
        spans = read_spans(runs, len(sample.tokens) - 1)
        out, begin = np.empty(sum(end - first for first, end in spans), dtype), 0
        for first, end in spans:
            sample.copy_tokens(first, out[begin : begin + end - first])
            begin += end - first
        return out

    def read_alone(self, dtype: np.dtype[Any], source: SampleSource, k: int) -> np.ndarray:
        """`read` for sample k of `source`, in a process without the micro-batch's plan."""
        sample = source.read(k)
        length = len(sample.tokens) - 1
        runs = self.layout.runs(self.padded(length), self._starts(sample, length))[self.context_rank]
        return self.read(sample, runs, dtype)

    def _starts(self, row: Sample, length: int) -> np.ndarray:
        """First tokens of the documents in a padded sample; padding is the last document."""
        padding = np.array([length] if self.padded(length) > length else [], np.int64)
        if not self.masked:
            return np.append(np.zeros(1, np.int64), padding)
        return np.append(row.documents[row.documents < length], padding)


def read_spans(runs: Runs, length: int) -> list[tuple[int, int]]:
    """The tokens of a sample that a rank with `runs` reads: (first, one after the last), for each run.

    Args:
        length: tokens S that the sample trains on; the rest is padding and is not read.
    """
    return [(first, min(stop, length) + 1) for first, stop in runs.tolist() if first < length]
