"""The data of one stage of a run.

For each domain: tokens, epochs and repeats. Documents by length, in the datasets and in the run. How many samples
contain a piece of one document of at least each length, because a model learns long distances only from long pieces.
What is cut at sample borders, and what is never shown.

Counts of documents follow from the rules and are exact to a document or two. Samples are computed one by one; if a run
has more than MOST_SAMPLES, only that many, evenly spaced. Only the `.idx` is read, without torch. IDs of a dataset that
does not record its vocabulary are compared with the model's, if that is known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalong.config.schema import Config
from megalong.data.lengths import LengthHistogram
from megalong.data.samples.rows import Rows
from megalong.data.samples.sampler import DomainShare, PackedSamples
from megalong.data.tokenizer_check import ALLOW, check_tokenizers

MOST_SAMPLES = 5000


@dataclass(frozen=True)
class Lengths:
    """Documents and tokens by doublings of the length: float64 [63] each."""

    documents: np.ndarray
    tokens: np.ndarray

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(self.documents + other.documents, self.tokens + other.tokens)

    def times(self, factor: float) -> Lengths:
        """Each document `factor` times."""
        return Lengths(self.documents * factor, self.tokens * factor)


@dataclass(frozen=True)
class DomainPlan:
    """One domain of a stage.

    Attributes:
        stored: training documents of the dataset, by length.
        seen: documents in the run, by length, repeats included.
        dropped: (documents, tokens) that are in no epoch.
        most_repeats: how often the run may show one document.
        held_out: documents for validation.
    """

    share: DomainShare
    weight: float
    stored: Lengths
    seen: Lengths
    dropped: tuple[int, int]
    most_repeats: int
    held_out: int


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        longest: int64 [samples computed], tokens of the longest piece of one document in each.
        cut: share of the beginnings and ends of samples that cut a document.
        padding: share of the tokens of samples that are padding.
    """

    config: Config
    samples: int
    domains: list[DomainPlan]
    longest: np.ndarray
    cut: float
    padding: float


def plan_stage(config: Config, vocabulary: int | None = None, tokenizer: Path | None = None) -> StagePlan:
    """The plan of the run or stage `config`.

    Args:
        vocabulary: vocabulary size of the model, None if unknown.
        tokenizer: folder of the model's tokenizer, None if unknown. If it is unknown, or a dataset does not record its
            own, a warning goes to stderr.

    Raises:
        UserError: a bad dataset, an empty part, IDs outside the model's vocabulary or of another tokenizer, a document
            repeated more often than allowed.
    """
    packed = PackedSamples.of(config)
    if vocabulary is not None:
        packed.refuse_foreign_ids(vocabulary)
    if config.model.load is not None:
        for line in check_tokenizers(packed.made_with(), tokenizer, ALLOW, config.data.allow_other_tokenizer):
            print(f"megalong: warning: {line}", file=sys.stderr)
    if config.evaluation.interval:
        PackedSamples.of(config, "validation")
    samples = config.training.train_iters * config.training.global_batch_size
    packed.refuse_repeats(samples)
    total = sum(entry.weight for entry in packed.mixture)
    domains = [
        _domain(rows, share, entry.weight / total)
        for entry, rows, share in zip(packed.mixture, packed.rows, packed.describe(samples), strict=True)
    ]
    numbers = np.linspace(0, samples - 1, min(samples, MOST_SAMPLES)).round().astype(int).tolist()
    rows = [packed.row(k) for k in numbers]
    longest = np.array([row.lengths.max() for row in rows], np.int64)
    cut = np.mean([cut for row in rows for cut in row.cuts])
    filled = np.mean([row.document_tokens for row in rows])
    padding = 1 - float(filled) / (packed.seq_length + 1)
    return StagePlan(config, samples, domains, longest, float(cut), padding)


def _domain(rows: Rows, share: DomainShare, weight: float) -> DomainPlan:
    stream = rows.stream
    part = stream.part_documents
    stored = _by_length(stream.lengths[part])
    seen, (documents, tokens) = stored.times(0), stream.used
    for lengths, ratio in stream.lengths_by_class():
        seen += _by_length(lengths).times(ratio * share.epochs)
    return DomainPlan(
        share=share,
        weight=weight,
        stored=stored,
        seen=seen,
        dropped=(int(stored.documents.sum()) - documents, int(stored.tokens.sum()) - tokens),
        most_repeats=rows.most_repeats(share.samples),
        held_out=stream.dataset.num_documents - len(part),
    )


def _by_length(lengths: np.ndarray) -> Lengths:
    histogram = LengthHistogram()
    histogram.add(lengths)
    state = histogram.state()
    return Lengths(np.array(state["documents"], np.float64), np.array(state["tokens"], np.float64))
