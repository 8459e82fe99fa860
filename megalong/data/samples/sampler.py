"""Packed samples of a mixture of domains; any rank can compute sample k from the number k alone.

    sample k → blending picks the domain and its sample number j → a shuffle picks piece i → tokens i·S .. (i+1)·S of
    the domain's stream

There is no iterator and no state: the data position of a run is k. Data-parallel ranks read different k, ranks that
share a sample read the same k, and a resumed run continues with the next k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from megalong.config.schema import Config
from megalong.data.indexed import IndexedDataset
from megalong.data.samples.blending import Blend
from megalong.data.samples.length_rules import LengthRules
from megalong.data.samples.pose import PoseSettings, skipped_positions
from megalong.data.samples.rows import Row, Rows, inner_length
from megalong.data.samples.sample import Sample
from megalong.data.samples.splitting import PARTS
from megalong.data.samples.stream import DomainStream
from megalong.data.samples.whole_documents import WholeDocuments
from megalong.data.synthetic.related import RelatedDocuments
from megalong.data.token_ids import same_ids
from megalong.data.tokenizer_check import DatasetTokenizer
from megalong.errors import UserError


class MixtureEntry(Protocol):
    """One domain of `data.mixture`: a name, a dataset's prefix, its share of the tokens, and its length rules."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def lengths(self) -> LengthRules | None: ...


@dataclass(frozen=True)
class DomainShare:
    """What a number of samples reads from one domain; `epochs` above 1 means that documents repeat."""

    name: str
    documents: int
    tokens_per_epoch: int
    samples: int
    tokens: int
    epochs: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.samples:,} samples, {self.tokens:,} tokens, {self.epochs:.3g} epochs of "
            f"{self.tokens_per_epoch:,} tokens in {self.documents:,} documents"
        )


class PackedSamples:
    """Packed samples of a mixture, endless and in a fixed order.

    Args:
        mixture: domains with `name`, `path` (a dataset's prefix), `weight`, `lengths`, and optionally `synthetic`.
        seq_length: tokens S that a sample trains on.
        seed: the run's seed; it decides the order of documents.
        split: shares of documents for training and validation, as in "99,1".
        part: "train" or "validation".
        index_folder: where `prepare` writes the shuffled orders for other ranks; None: they stay in memory.
        packing: `data.packing`. "naive" and "masked" have the same samples, of documents end to end. Samples of
            "best_fit" and "whole" contain whole documents and padding; longer documents are split (best_fit) or left
            out (whole). Packs of an entry with a `seq_length` are always masked from each other.
        pose: `data.pose`: positions that skip ahead.
        separator: `data.separator`: the separator that datasets must have; None: any.
        vocabulary: the model's vocabulary size. IDs beyond it are refused if the dataset records no size of its own.
            None: unknown, and IDs are not checked.

    Raises:
        UserError: an unreadable dataset, an empty part, a weight that is not positive, separators or tokenizers that
            differ.
    """

    def __init__(
        self,
        mixture: Sequence[MixtureEntry],
        seq_length: int,
        seed: int,
        split: str,
        part: str = "train",
        separator: str | None = None,
        index_folder: Path | None = None,
        packing: str = "naive",
        pose: PoseSettings | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is none of {PARTS}")
        _check_mixture(mixture)
        self.seq_length = seq_length
        self.names = [entry.name for entry in mixture]
        self.mixture = mixture
        lengths = [_pack_length(entry, seq_length) for entry in mixture]
        self.streams = [
            _stream_kind(entry, packing)(
                entry.path,
                _piece_length(entry, packing, seq_length, length),
                split,
                part,
                seed,
                entry.name,
                entry.lengths,
                inner_length(True, seq_length, length) + 1 if packing == "whole" else None,
                index_folder,
            )
            for entry, length in zip(mixture, lengths, strict=True)
        ]
        self.rows = [Rows(stream, seq_length, length) for stream, length in zip(self.streams, lengths, strict=True)]
        self._packing, self._seed, self._pose = packing, seed, pose
        self.masked = packing != "naive" or any(length is not None for length in lengths)
        self.tokenizer_sha256 = _common_tokenizer(self.names, self.streams)
        self.vocabulary_size = max((stream.vocabulary_size for stream in self.streams), default=0) or None
        datasets = [stream.dataset for stream in self.streams]
        _check_separators(self.names, datasets, separator)
        self._without_vocabulary = [dataset for dataset in datasets if dataset.vocabulary_size is None]
        for dataset in self._without_vocabulary:
            dataset.ids = vocabulary
        # Rows of a batch are stacked: if one domain has a target mask, every sample needs one.
        self._has_target_mask = any(_synthetic(entry) and _synthetic(entry).answer_only for entry in mixture) or any(
            length is not None for length in lengths
        )

    @classmethod
    def of(
        cls, config: Config, part: str = "train", index_folder: Path | None = None, vocabulary: int | None = None
    ) -> Self:
        """The samples of a run's `data.mixture`. `data.pose` does not change the positions of held-out samples."""
        data = config.data
        return cls(
            data.mixture,
            data.seq_length,
            config.run.seed,
            data.split,
            part,
            data.separator,
            index_folder,
            data.packing,
            data.pose if part == "train" else None,
            vocabulary,
        )

    def refuse_foreign_ids(self, vocabulary: int) -> None:
        """Refuse datasets with IDs of `vocabulary` or above; checks a part of the data before a run.

        Raises:
            UserError: a dataset's tokenizer has more IDs, or it records no tokenizer and contains an ID out of range.
        """
        if (found := self.vocabulary_size or 0) > vocabulary:
            raise UserError(
                f"data.mixture: tokenized with a vocabulary of {found}, but the model has {vocabulary}; use "
                "the model's own tokenizer"
            )
        for dataset in self._without_vocabulary:
            dataset.refuse_ids_from(vocabulary)

    def made_with(self) -> list[DatasetTokenizer]:
        """Which tokenizer each dataset was made with, for `check_tokenizers`."""
        return [
            DatasetTokenizer(f"data.mixture: {name}", stream.made_with, (stream.dataset.sidecar or {}).get("separator"))
            for name, stream in zip(self.names, self.streams, strict=True)
        ]

    @cached_property
    def token_type(self) -> np.dtype[Any]:
        """The narrowest type that fits the stored tokens of all datasets."""
        return np.result_type(*(stream.dataset.dtype for stream in self.streams))

    @cached_property
    def _blend(self) -> Blend:
        """Assigns samples so that weights are shares of tokens: a domain with more padding gets more samples."""
        count = 1000  # samples over which the tokens of a sample are averaged
        fills = [rows.tokens(count) / count for rows in self.rows]
        return Blend([entry.weight * self.seq_length / fill for entry, fill in zip(self.mixture, fills, strict=True)])

    def row(self, k: int) -> Row:
        """The row of sample k, with its pieces."""
        domain, j = self._blend.of(k)
        return self.rows[domain].row(j)

    def read(self, k: int) -> Sample:
        """Sample k; its tokens are read lazily."""
        domain, j = self._blend.of(k)
        row = self.rows[domain].row(j)
        by_document = self._packing != "naive" or (self.masked and _synthetic(self.mixture[domain]) is not None)
        bounds, positions = row.starts if by_document else row.bounds, None
        if self._pose is not None:
            positions = skipped_positions(bounds, self.seq_length, self._pose, self._seed, k)
        return Sample(row.tokens, bounds, row.filled, positions, self._targets(row))

    def _targets(self, row: Row) -> np.ndarray | None:
        """bool [seq_length + 1]: the tokens that are targets; None: no sample has a target mask."""
        if not self._has_target_mask:
            return None
        targets = row.targets
        return np.ones(self.seq_length + 1, bool) if targets is None else targets

    def domain_of(self, k: int) -> str:
        """Name of the domain that sample k comes from."""
        return self.names[self._blend.of(k)[0]]

    def prepare(self, first: int, last: int) -> None:
        """Shuffle the epochs that samples `first` up to `last` need, once, into the index folder."""
        counts = zip(self._blend.counts(first).tolist(), self._blend.counts(last).tolist(), strict=True)
        for rows, (before, after) in zip(self.rows, counts, strict=True):
            rows.prepare(before, after)

    def describe(self, samples: int) -> list[DomainShare]:
        """What the first `samples` samples read from each domain, in the mixture's order."""
        counts = self._blend.counts(samples).tolist()
        return [self._share(domain, count) for domain, count in enumerate(counts)]

    def refuse_repeats(self, samples: int) -> None:
        """Refuse a run of `samples` samples that repeats documents more often than `lengths.max_repeats` allows.

        Raises:
            UserError: a domain's documents would occur more often.
        """
        if not any(entry.lengths and entry.lengths.max_repeats for entry in self.mixture):
            return  # skip the count, for which documents may have to be joined or packed
        for entry, rows, count in zip(self.mixture, self.rows, self._blend.counts(samples), strict=True):
            cap = entry.lengths.max_repeats if entry.lengths is not None else None
            if cap is not None and (most := rows.most_repeats(int(count))) > cap:
                raise UserError(
                    f"data.mixture: {entry.name}: this run shows documents up to {most} times, but lengths.max_repeats "
                    f"allows {cap}: it reads {count * self.seq_length:,} tokens, and an epoch has "
                    f"{rows.stream.tokens_per_epoch:,}; lower its weight or repeat, or train fewer steps"
                )

    def _share(self, domain: int, samples: int) -> DomainShare:
        stream = self.streams[domain]
        tokens = self.rows[domain].tokens(samples)
        return DomainShare(
            name=self.names[domain],
            documents=stream.used[0],
            tokens_per_epoch=stream.tokens_per_epoch,
            samples=samples,
            tokens=tokens,
            epochs=tokens / stream.tokens_per_epoch,
        )


def _check_mixture(mixture: Sequence[MixtureEntry]) -> None:
    if not mixture:
        raise UserError(
            "data.mixture: empty; list at least one domain as {name: …, path: …, weight: 1} (for task sft see "
            "megalong data inspect)"
        )
    names = [entry.name for entry in mixture]
    for entry in mixture:
        if not 0 < entry.weight < float("inf"):
            raise UserError(f"data.mixture: weight {entry.weight} of {entry.name!r} must be above 0; remove the domain")
        if names.count(entry.name) > 1:
            raise UserError(f"data.mixture: the name {entry.name!r} occurs twice; give every domain a name of its own")


def _synthetic(entry: MixtureEntry) -> Any:
    """`synthetic` of an entry; None if its samples are the dataset's own documents."""
    return getattr(entry, "synthetic", None)


def _pack_length(entry: MixtureEntry, seq_length: int) -> int | None:
    """`seq_length` of an entry."""
    length = getattr(entry, "seq_length", None)
    if length is not None and (length < 2 or seq_length % length):
        raise UserError(
            f"data.mixture: {entry.name}: seq_length {length} does not divide data.seq_length {seq_length}; write a "
            "divisor of 2 or more"
        )
    return length


def _piece_length(entry: MixtureEntry, packing: str, seq_length: int, pack_length: int | None) -> int:
    """`seq_length` of an entry's stream."""
    return inner_length(_in_bins(entry, packing), seq_length, pack_length)


def _in_bins(entry: MixtureEntry, packing: str) -> bool:
    """Whether an entry's samples are packed from whole documents."""
    synthetic = _synthetic(entry)
    return packing in ("best_fit", "whole") if synthetic is None else synthetic.task == "related"


def _stream_kind(entry: MixtureEntry, packing: str) -> Callable[..., DomainStream]:
    """The class that makes samples from an entry's dataset."""
    synthetic = _synthetic(entry)
    if synthetic is None:
        return WholeDocuments if _in_bins(entry, packing) else DomainStream
    if synthetic.task == "related":
        return RelatedDocuments
    from megalong.data.synthetic.documents import TaskDocuments  # imports `tokenizers`, which is slow

    return partial(TaskDocuments, synthetic)


def _common_tokenizer(names: list[str], streams: Sequence[DomainStream]) -> str | None:
    """Fingerprint of the tokenizer that all datasets were made with; None if no dataset records it."""
    first: tuple[str, dict[str, str]] | None = None
    for name, stream in zip(names, streams, strict=True):
        tokenizer = stream.made_with
        if tokenizer is None:
            continue
        if first is None:
            first = name, tokenizer
        elif not same_ids(first[1], tokenizer):
            raise UserError(
                f"data.mixture: {first[0]!r} was tokenized with {first[1]['name']!r} and {name!r} with "
                f"{tokenizer['name']!r}, which gives other ids; preprocess them with one tokenizer"
            )
    return first[1]["sha256"] if first else None


def _check_separators(names: list[str], datasets: list[IndexedDataset], wanted: str | None) -> None:
    for name, dataset in zip(names, datasets, strict=True):
        if wanted is None or dataset.sidecar is None:
            continue
        found = (dataset.sidecar.get("separator") or {}).get("text")
        if found != wanted:
            raise UserError(
                f"data.separator: {wanted!r} expected, but {name!r} was written with {found!r}; "
                f"preprocess it again with --separator {wanted!r} or change data.separator"
            )
