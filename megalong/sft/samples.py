"""Samples of whole conversations, packed by best fit. Any rank can compute a sample from its number alone.

    epoch e → its conversations → bins of at most S + 1 tokens (bins.py) → shuffled → sample k

Conversations are masked from each other, and positions restart. Padding and tokens that are not the assistant's are no
targets. With `sft.loss_average: conversations` the loss of each of a conversation's n targets has weight 1/n, and the
sum is divided by the number of conversations in the global batch.

All sources are packed together, so short chats fill the room that long ones leave. Without weights an epoch contains
every conversation once. With weights it ends when the scarcest source has been seen once; the others continue in the
next epoch where they stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalong.data.samples.bins import best_fit
from megalong.data.samples.sample import Sample
from megalong.data.samples.splitting import documents_of_part
from megalong.sft.prepare import Prepared, prepare, report_lines

if TYPE_CHECKING:
    from megalong.config.schema import Config


@dataclass(frozen=True)
class Packing:
    """What the samples of an epoch contain; `wasted` is the share of padding."""

    conversations: int
    samples: int
    tokens: int
    targets: int
    wasted: float

    def __str__(self) -> str:
        return (
            f"an epoch is {self.conversations:,} conversations in {self.samples:,} samples: {self.tokens:,} tokens, "
            f"{self.targets:,} of them targets, {self.wasted:.2%} padding"
        )


class ConversationSamples:
    """Packed conversations, endless and in a fixed order.

    Args:
        weights: share of tokens of each source; None: every conversation once.
        seq_length: tokens S that a sample trains on.
        split: shares of conversations for training and validation, as in "99,1", source by source.
        part: "train" or "validation".
        average: what the loss is averaged over: "tokens" or "conversations".

    Raises:
        UserError: a source has no conversation for the part.
    """

    def __init__(
        self,
        prepared: Prepared,
        weights: list[float] | None,
        seq_length: int,
        seed: int,
        split: str,
        part: str,
        average: str = "tokens",
    ) -> None:
        self.seq_length = seq_length
        self.vocabulary_size = int(prepared.ids.max()) + 1
        self._prepared, self._seed, self._average = prepared, seed, average
        self._lengths, self._starts = prepared.lengths, prepared.ends - prepared.lengths
        self._pools = []
        for number, name in enumerate(prepared.report):
            own = np.flatnonzero(prepared.sources == number)
            self._pools.append(own[documents_of_part(len(own), split, part, f"sft.sources {name}")])
        self._counts = self._per_epoch(weights)
        self._epoch = lru_cache(maxsize=2)(self._packed)

    @classmethod
    def open(cls, config: Config, part: str, tokenizer: str | Path, folder: Path) -> ConversationSamples:
        """The samples of a run's part. Tokenizes the sources unless that is already done.

        Raises:
            UserError: as `prepare` and the class.
        """
        weights = [source.weight for source in config.sft.sources if source.weight is not None]
        prepared = prepare(config.sft, config.data.seq_length, tokenizer, folder)
        length, seed, split = config.data.seq_length, config.run.seed, config.data.split
        return cls(prepared, weights or None, length, seed, split, part, config.sft.loss_average)

    def read(self, k: int) -> Sample:
        """Sample k, with its targets."""
        for epoch in count():
            conversations, ends = self._epoch(epoch)
            if k < len(ends):
                break
            k -= len(ends)
        tokens = np.zeros(self.seq_length + 1, np.int64)
        targets = np.zeros(self.seq_length + 1, bool)
        starts, filled = [0], 0
        for number in conversations[ends[k - 1] if k else 0 : ends[k]].tolist():
            first, length = int(self._starts[number]), int(self._lengths[number])
            tokens[filled : filled + length] = self._prepared.ids[first : first + length]
            targets[filled : filled + length] = self._prepared.targets[first : first + length]
            targets[filled] = False  # nothing predicts the first token of a conversation
            filled += length
            starts.append(filled)
        documents = np.array([start for start in starts if start <= self.seq_length], np.int64)
        weights = equal_weights(targets, starts) if self._average == "conversations" else None
        return Sample(tokens, documents, filled, targets=targets, weights=weights)

    def prepare(self, first: int, last: int) -> None:
        """Does nothing: `open` has tokenized everything, and packing takes each rank only a moment."""

    def describe(self, samples: int) -> list[object]:
        """What was read of each source, what was left out and why, and how the first epoch is packed."""
        conversations, ends = self._epoch(0)
        tokens = int(self._lengths[conversations].sum())
        spans = zip(self._starts[conversations].tolist(), self._lengths[conversations].tolist(), strict=True)
        targets = sum(int(self._prepared.targets[a + 1 : a + n].sum()) for a, n in spans)
        wasted = 1 - tokens / (len(ends) * (self.seq_length + 1))
        packing = Packing(len(conversations), len(ends), tokens, targets, wasted)
        return [*report_lines(self._prepared.report), packing]

    def _per_epoch(self, weights: list[float] | None) -> list[int]:
        """Conversations per epoch of each source, at least one."""
        if weights is None:
            return [len(pool) for pool in self._pools]
        tokens = [int(self._lengths[pool].sum()) for pool in self._pools]
        whole = min(count / weight for count, weight in zip(tokens, weights, strict=True))
        return [
            max(1, round(len(pool) * weight * whole / count))
            for pool, weight, count in zip(self._pools, weights, tokens, strict=True)
        ]

    def _packed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(conversations of an epoch in the order of its samples, their number up to each sample's end)."""
        taken = np.concatenate([self._taken(source, epoch) for source in range(len(self._pools))])
        bin_of, bins = best_fit(self._lengths[taken], self.seq_length + 1)
        sample_of = np.random.RandomState([self._seed, epoch]).permutation(bins)[bin_of]
        return taken[np.argsort(sample_of, kind="stable")], np.cumsum(np.bincount(sample_of, minlength=bins))

    def _taken(self, source: int, epoch: int) -> np.ndarray:
        """The conversations of a source in an epoch: its pool is repeated, shuffled again each time."""
        pool, each = self._pools[source], self._counts[source]
        first, last = epoch * each, (epoch + 1) * each
        rounds = range(first // len(pool), -(-last // len(pool)))
        shuffled = [np.random.RandomState([self._seed, source, turn]).permutation(pool) for turn in rounds]
        begin = first - rounds[0] * len(pool)
        return np.concatenate(shuffled)[begin : begin + each]


def equal_weights(targets: np.ndarray, starts: list[int]) -> np.ndarray:
    """float32 [2, S + 1], `weights` of a `Sample`: each conversation, `starts[i]` to `starts[i + 1]`, has weight 1."""
    weights = np.zeros((2, len(targets)), np.float32)
    for first, last in pairwise(starts):
        own = first + np.flatnonzero(targets[first:last])
        if len(own):
            weights[0, own] = 1 / len(own)
            weights[1, own[0]] = 1
    return weights
