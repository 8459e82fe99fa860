"""What a run sees: packed samples of a mixture of domains, computable by any rank from a number alone.

    sample k → blending picks the domain and its sample number j → a shuffle picks piece i → tokens i·S .. (i+1)·S of
    the domain's stream

There is no iterator and no state: the data position of a run is k. Ranks of one data-parallel group ask for different
k, ranks that share a sample for the same one, and a resumed run goes on with the next k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megalong.data.blending import Blend
from megalong.data.indexed import IndexedDataset
from megalong.data.length_rules import LengthRules
from megalong.data.splitting import PARTS
from megalong.data.stream import DomainStream
from megalong.data.whole_documents import WholeDocuments
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
    """What a number of samples needs from one domain; `epochs` above 1 means documents are seen again."""

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
        mixture: domains with `name`, `path` (a dataset's prefix), `weight` and `lengths`.
        seq_length: tokens S a sample trains on.
        seed: the run's seed; it decides the order of documents.
        split: shares of documents for training and validation, as in "99,1".
        part: "train" or "validation".
        index_folder: where `prepare` leaves the shuffled orders for other ranks to read; None keeps them in memory.
        packing: `data.packing`. "naive" and "masked" read the same samples, documents laid end to end; with "best_fit"
            and "whole" those hold whole documents and padding, and longer documents in pieces, or not at all.
        separator: `data.separator`: what must stand between documents; None takes the datasets as they are.

    Raises:
        UserError: an unreadable dataset, an empty part, a weight not above 0, separators or tokenizers that disagree.
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
    ) -> None:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is none of {PARTS}")
        _check_mixture(mixture)
        self.seq_length = seq_length
        self.names = [entry.name for entry in mixture]
        self.mixture = mixture
        kind = WholeDocuments if packing in ("best_fit", "whole") else DomainStream
        longest = seq_length + 1 if packing == "whole" else None
        self.streams = [
            kind(entry.path, split, part, seed, entry.name, entry.lengths, longest, index_folder) for entry in mixture
        ]
        datasets = [stream.dataset for stream in self.streams]
        self.tokenizer_sha256 = _common_tokenizer(self.names, datasets)
        self.vocabulary_size = max((_told(d, "vocabulary_size", 0) for d in datasets), default=0) or None
        _check_separators(self.names, datasets, separator)

    @cached_property
    def _blend(self) -> Blend:
        """Deals samples out such that weights are shares of tokens: a domain with more padding gets more samples."""
        known = 1000  # samples over which the tokens of a sample are averaged
        fills = [stream.tokens_of_samples(known, self.seq_length) / known for stream in self.streams]
        return Blend([entry.weight * self.seq_length / fill for entry, fill in zip(self.mixture, fills, strict=True)])

    def sample(self, k: int) -> np.ndarray:
        """int64 [seq_length + 1]: sample k; [:-1] are the inputs, [1:] the targets."""
        domain, j = self._blend.of(k)
        return self.streams[domain].sample(j, self.seq_length)

    def documents(self, k: int) -> np.ndarray:
        """int64, ascending from 0: the tokens of sample k at which a document, or the rest of one, begins."""
        domain, j = self._blend.of(k)
        return self.streams[domain].documents_of_sample(j, self.seq_length)

    def filled(self, k: int) -> int:
        """Tokens of sample k that are documents', at most seq_length + 1; padding follows, the last of `documents`."""
        domain, j = self._blend.of(k)
        return self.streams[domain].filled_of_sample(j, self.seq_length)

    def cuts(self, k: int) -> tuple[bool, bool]:
        """Whether sample k begins, and whether it ends, inside a document."""
        domain, j = self._blend.of(k)
        return self.streams[domain].cuts_of_sample(j, self.seq_length)

    def domain_of(self, k: int) -> str:
        """Name of the domain that sample k comes from."""
        return self.names[self._blend.of(k)[0]]

    def prepare(self, first: int, last: int) -> None:
        """Shuffle the epochs that samples `first` up to `last` need, once, into the index folder."""
        counts = zip(self._blend.counts(first).tolist(), self._blend.counts(last).tolist(), strict=True)
        for stream, (before, after) in zip(self.streams, counts, strict=True):
            stream.prepare(before, after, self.seq_length)

    def describe(self, samples: int) -> list[DomainShare]:
        """What the first `samples` samples take from each domain, in the mixture's order."""
        counts = self._blend.counts(samples).tolist()
        return [self._share(domain, count) for domain, count in enumerate(counts)]

    def refuse_repeats(self, samples: int) -> None:
        """Refuse a run of `samples` samples that shows documents more often than `lengths.max_repeats` allows.

        Raises:
            UserError: a domain's documents would come more often.
        """
        for entry, stream, count in zip(self.mixture, self.streams, self._blend.counts(samples), strict=True):
            cap = entry.lengths.max_repeats if entry.lengths is not None else None
            if cap is not None and (most := stream.most_repeats(int(count), self.seq_length)) > cap:
                raise UserError(
                    f"data.mixture: {entry.name}: this run shows documents up to {most} times, lengths.max_repeats "
                    f"allows {cap}: {count * self.seq_length:,} tokens are asked of "
                    f"{stream.tokens_per_epoch:,} an epoch; lower its weight or repeat, or train fewer steps"
                )

    def _share(self, domain: int, samples: int) -> DomainShare:
        stream = self.streams[domain]
        tokens = stream.tokens_of_samples(samples, self.seq_length)
        return DomainShare(
            name=self.names[domain],
            documents=sum(len(one.documents) for one in stream.epochs.classes),
            tokens_per_epoch=stream.tokens_per_epoch,
            samples=samples,
            tokens=tokens,
            epochs=tokens / stream.tokens_per_epoch,
        )


def _check_mixture(mixture: Sequence[MixtureEntry]) -> None:
    if not mixture:
        raise UserError("data.mixture: empty; list at least one domain as {name: …, path: …, weight: 1}")
    names = [entry.name for entry in mixture]
    for entry in mixture:
        if not 0 < entry.weight < float("inf"):
            raise UserError(f"data.mixture: weight {entry.weight} of {entry.name!r} must be above 0; remove the domain")
        if names.count(entry.name) > 1:
            raise UserError(f"data.mixture: the name {entry.name!r} stands twice; give every domain a name of its own")


def _told(dataset: IndexedDataset, key: str, default: Any) -> Any:
    """What the sidecar says about `key`; a dataset of another tool has none and says nothing."""
    return (dataset.sidecar or {}).get(key, default)


def _common_tokenizer(names: list[str], datasets: list[IndexedDataset]) -> str | None:
    """Fingerprint of the tokenizer all datasets were made with; None where no dataset tells."""
    first: tuple[str, dict[str, str]] | None = None
    for name, dataset in zip(names, datasets, strict=True):
        tokenizer = _told(dataset, "tokenizer", None)
        if tokenizer is None:
            continue
        if first is None:
            first = name, tokenizer
        elif tokenizer["sha256"] != first[1]["sha256"]:
            raise UserError(
                f"data.mixture: {first[0]!r} was tokenized with {first[1]['name']!r} and {name!r} with "
                f"{tokenizer['name']!r}, whose ids mean other text; preprocess them with one tokenizer"
            )
    return first[1]["sha256"] if first else None


def _check_separators(names: list[str], datasets: list[IndexedDataset], wanted: str | None) -> None:
    for name, dataset in zip(names, datasets, strict=True):
        if wanted is None or dataset.sidecar is None:
            continue
        found = (_told(dataset, "separator", None) or {}).get("text")
        if found != wanted:
            raise UserError(
                f"data.separator: {wanted!r} asked for, but {name!r} was written with {found!r}; "
                f"preprocess it again with --separator {wanted!r} or change data.separator"
            )
