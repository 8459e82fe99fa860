"""What a stage of a run will see of its data.

Tokens, epochs and repeats of each domain; documents by length as the datasets hold them and as the run
draws them; how many samples hold a piece of one document of at least each length, which is what a model can learn
distances from; what is cut at the borders of samples, and what never comes.

Counts of documents follow from the rules, exact to a document or two. Samples are looked at one by one, or LOOKED_AT of
them, evenly spaced, where a run has more: only the `.idx` is read, and no torch. Ids of a dataset that does not tell
its vocabulary are held against the model's, where that is known.
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

LOOKED_AT = 5000


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
        held: training documents of the dataset, by length.
        seen: what the run shows of them, repeats counted as often as they come.
        dropped: (documents, tokens) that no epoch holds.
        most_repeats: how often the run may show one document.
        held_out: documents for validation.
    """

    share: DomainShare
    weight: float
    held: Lengths
    seen: Lengths
    dropped: tuple[int, int]
    most_repeats: int
    held_out: int


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        longest: int64 [samples looked at], tokens of the longest piece of one document in each.
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
    """What the run, or stage, `config` will see.

    Args:
        vocabulary: ids the model has, None where that is not known.
        tokenizer: folder of the model's tokenizer, None where that is not known; then, and where a dataset does not say
            its own, a warning goes to stderr.

    Raises:
        UserError: a bad dataset, an empty part, ids the model does not have or of another tokenizer, a document shown
            more often than allowed.
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
    looked_at = np.linspace(0, samples - 1, min(samples, LOOKED_AT)).round().astype(int).tolist()
    rows = [packed.row(k) for k in looked_at]
    longest = np.array([row.lengths.max() for row in rows], np.int64)
    cut = np.mean([cut for row in rows for cut in row.cuts])
    filled = np.mean([row.held for row in rows])
    padding = 1 - float(filled) / (packed.seq_length + 1)
    return StagePlan(config, samples, domains, longest, float(cut), padding)


def _domain(rows: Rows, share: DomainShare, weight: float) -> DomainPlan:
    stream = rows.stream
    given = stream.given
    held = _by_length(stream.lengths[given])
    seen, (documents, tokens) = held.times(0), stream.taken
    for lengths, ratio in stream.lengths_by_class():
        seen += _by_length(lengths).times(ratio * share.epochs)
    return DomainPlan(
        share=share,
        weight=weight,
        held=held,
        seen=seen,
        dropped=(int(held.documents.sum()) - documents, int(held.tokens.sum()) - tokens),
        most_repeats=rows.most_repeats(share.samples),
        held_out=stream.dataset.num_documents - len(given),
    )


def _by_length(lengths: np.ndarray) -> Lengths:
    histogram = LengthHistogram()
    histogram.add(lengths)
    state = histogram.state()
    return Lengths(np.array(state["documents"], np.float64), np.array(state["tokens"], np.float64))
