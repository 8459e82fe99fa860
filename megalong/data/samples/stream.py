"""The endless token stream of one domain: documents end to end, shuffled again in each epoch.

Naive packing: the piece at place i is tokens i·S to (i+1)·S of the stream, both included. It has S inputs and, shifted
by one, S targets; neighbours share one token. Documents are cut where a piece ends and continue in the next.

    epoch 0: documents c a b      c c c a a b b b b | b a a c ...   epoch 1: b a c
    S = 4                        [c c c a a]
                                         [a b b b b]
                                                 [b | b a a c]

Samples are these pieces, shuffled within blocks of about an epoch. Otherwise the pieces of one long document would fill
a whole batch. (The quickstart's model without this shuffle: loss 4.33 instead of 3.18 after 330 steps.)

Any sample is found without walking the stream: the start of an epoch is a formula (e·T without length rules), and a
binary search in the cumulative lengths of that epoch gives the document of a token. The order of an epoch is a function
of (seed, domain name, part, rules, epoch). Any rank can therefore compute any sample, and a resume needs no state but a
number.
"""

from __future__ import annotations

import zlib
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalong.data.indexed import IndexedDataset
from megalong.data.samples.epoch_index import EpochIndex
from megalong.data.samples.epochs import Epochs
from megalong.data.samples.length_rules import LengthClass, LengthRules, from_arrays, length_classes, to_arrays
from megalong.data.samples.piece import Piece
from megalong.data.samples.sample import StoredTokens
from megalong.data.samples.splitting import documents_of_part
from megalong.errors import UserError

if TYPE_CHECKING:
    from megalong.data.tokenizer import TextTokenizer


class DomainStream:
    """The documents of one part of a dataset, epoch after epoch.

    Args:
        prefix: the dataset.
        seq_length: S of its samples, which have S + 1 tokens.
        split, part: which of its documents, such as "99,1" and "train".
        seed: the run's seed.
        name: the domain's name; streams of different name or part are shuffled independently.
        rules: `lengths` of the domain; None: every epoch contains each document once.
        longest: longer documents are left out; None: none are.
        index_folder: where `prepare` writes orders for other ranks; None: they stay in memory.

    Raises:
        UserError: an unreadable dataset, or a part that is empty, has no tokens, or is left without any by the rules.
            Raised at once without an index folder, else on first use.
    """

    tokenizer: TextTokenizer | None = None  # set if the domain's samples need one

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        split: str,
        part: str,
        seed: int,
        name: str,
        rules: LengthRules | None = None,
        longest: int | None = None,
        index_folder: Path | None = None,
    ) -> None:
        self.seq_length = seq_length
        self._split, self._part, self._rules, self._where = split, part, rules, f"{name}/{part}"
        self._longest = longest
        self._seed = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, zlib.crc32(self._where.encode())]
        self._index = EpochIndex(index_folder, prefix, split, part, self._seed, rules, longest)
        self.dataset = IndexedDataset(prefix, checked=self._index.load("classes") is not None)
        # Two epochs are cached: a sample or a global batch may span an epoch border.
        self._epoch = lru_cache(maxsize=2)(self._indexed_epoch)
        self._block = lru_cache(maxsize=2)(self._indexed_block)
        if index_folder is None:
            _ = self.epochs

    @cached_property
    def epochs(self) -> Epochs:
        """The documents of each epoch, and where it begins."""
        stored = self._index.load("classes")
        return Epochs(from_arrays(stored) if stored is not None else self._classes())

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of an epoch, on average."""
        return self.epochs.tokens_per_epoch

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents of the dataset]: tokens of each."""
        return self.dataset.document_lengths

    @property
    def part_documents(self) -> np.ndarray:
        """int64, ascending: all documents of this part before length rules, empty ones included."""
        return documents_of_part(self.dataset.num_documents, self._split, self._part, self.dataset.prefix)

    def _classes(self) -> list[LengthClass]:
        part = self.part_documents
        lengths = self.lengths[part]
        usable = lengths > 0
        if self._longest is not None:
            usable &= lengths <= self._longest
        documents = part[usable].astype(np.int32 if self.dataset.num_documents < 2**31 else np.int64)
        if len(documents) == 0:
            what = f"1 to {self._longest} tokens, as data.packing whole requires" if self._longest else "a token"
            raise UserError(f"{self.dataset.prefix}: none of the {len(part)} documents of {self._where} has {what}")
        # A seed of three numbers; those of epochs have four and those of blocks five.
        random = np.random.RandomState(self._seed)
        return length_classes(documents, lengths[usable], self._rules, random, self._where)

    def order(self, epoch: int) -> np.ndarray:
        """Document indices in the order of `epoch`."""
        return self._epoch(epoch)[0]

    def tokens(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: tokens `start` up to `start + length` of the stream."""
        out = np.empty(length, np.int64)
        self.copy(start, out)
        return out

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, of any type that fits the IDs, with the stream's tokens from `start` on."""
        filled = 0
        while filled < len(out):
            epoch, first = self.epochs.around(start + filled)
            filled += self._fill(out[filled:] if filled else out, epoch, start + filled - first)

    def piece(self, j: int) -> Piece:
        """Sample j of this domain."""
        return _StreamPiece(self, self.place_of(j) * self.seq_length)

    def tokens_of_pieces(self, pieces: int) -> int:
        """Tokens of documents in the first `pieces` samples; shared tokens count once."""
        return pieces * self.seq_length

    @property
    def made_with(self) -> dict[str, str] | None:
        """The sidecar's record of the tokenizer (`name`, `sha256`, …); None if it has no record."""
        return (self.dataset.sidecar or {}).get("tokenizer")

    @property
    def vocabulary_size(self) -> int:
        """Highest ID + 1 that its samples may contain, 0 if the dataset does not record it."""
        return int((self.dataset.sidecar or {}).get("vocabulary_size", 0))

    @property
    def used(self) -> tuple[int, int]:
        """(documents, tokens) of the dataset that epochs use, before packing."""
        classes = self.epochs.classes
        return sum(len(one.documents) for one in classes), sum(one.tokens for one in classes)

    def lengths_by_class(self) -> list[tuple[np.ndarray, float]]:
        """For each class: tokens of its documents, and how often an epoch contains them on average."""
        return [(self.lengths[one.documents], one.ratio) for one in self.epochs.classes]

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """int64, ascending from 0: where documents begin among tokens `start` up to `start + length` of the stream."""
        found, begin = [np.zeros(1, np.int64)], start
        while begin < start + length:
            epoch, first = self.epochs.around(begin)
            ends = self._epoch(epoch)[1]
            lowest, highest = np.searchsorted(ends, [begin - first, start + length - first], side="left")
            inside = ends[lowest:highest] + first - start
            found.append(inside[inside > 0])
            begin = first + int(ends[-1])
        return np.unique(np.concatenate(found))

    def place_of(self, j: int) -> int:
        """The place of sample j, which begins with token place · S. Each block of samples permutes its places."""
        block, place = divmod(j, self._block_size)
        return block * self._block_size + int(self._block(self._block_size, block)[place])

    def most_repeats(self, pieces: int) -> int:
        """How often one document may occur in the first `pieces` samples, which are drawn from whole blocks."""
        if pieces == 0:
            return 0
        size = self._block_size
        last = ((pieces - 1) // size + 1) * size * self.seq_length - 1
        epoch = self.epochs.at(last)
        order, ends = self._epoch(epoch)
        reached = int(np.searchsorted(ends, last - self.epochs.start(epoch), side="right")) + 1
        now = np.bincount(order[:reached], minlength=self.dataset.num_documents)
        return max(int((one.times_before(epoch) + now[one.documents]).max()) for one in self.epochs.classes)

    @property
    def _block_size(self) -> int:
        return max(1, self.tokens_per_epoch // self.seq_length)

    def prepare(self, first: int, last: int) -> None:
        """Write the orders that samples `first` up to `last` need, if they are not on disk yet."""
        if last <= first:
            return
        self._store_classes()
        size = self._block_size
        blocks = range(first // size, (last - 1) // size + 1)
        start, end = blocks.start * size * self.seq_length, blocks.stop * size * self.seq_length
        for epoch in range(self.epochs.at(start), self.epochs.at(end) + 1):
            self._index.store(partial(self._shuffled, epoch), "epoch", epoch)
        for block in blocks:
            self._index.store(partial(self._permuted, size, block), "block", size, block)

    def _store_classes(self) -> None:
        self._index.store(lambda: to_arrays(self._classes()), "classes")

    def _fill(self, out: np.ndarray, epoch: int, offset: int) -> int:
        """Copy tokens of one epoch from `offset` on; returns their number, at most len(out)."""
        order, ends = self._epoch(epoch)
        stop = min(offset + len(out), int(ends[-1]))
        # Array methods, not numpy functions: samples of a million tokens are read at memcpy speed, and the overhead of
        # the functions' wrappers would be visible.
        place, last = int(ends.searchsorted(offset, "right")), int(ends.searchsorted(stop, "left"))
        cuts = np.empty(last - place + 2, np.int64)
        cuts[0], cuts[1:-1], cuts[-1] = offset, ends[place:last], stop
        starts = self.dataset.starts_of(order[place : last + 1])
        starts[0] += offset - (int(ends[place - 1]) if place else 0)
        self.dataset.gather(starts, cuts[1:] - cuts[:-1], out[: stop - offset])
        return stop - offset

    def _indexed_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order, ends = self._index.load("epoch", epoch) or self._shuffled(epoch)
        return order, ends

    def _indexed_block(self, size: int, block: int) -> np.ndarray:
        (order,) = self._index.load("block", size, block) or self._permuted(size, block)
        return order

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in order, and the token at which each of them ends.

        RandomState's stream never changes between numpy versions (NEP 19), so a run resumed under another numpy sees
        the same data.
        """
        order = self.epochs.shuffled(epoch, np.random.RandomState([*self._seed, epoch]))
        return order, np.cumsum(self.lengths[order])

    def _permuted(self, size: int, block: int) -> tuple[np.ndarray]:
        """The order in which a block's pieces become samples. Its seed differs from those of the epochs."""
        return (np.random.RandomState([*self._seed, block, size]).permutation(size),)


class _StreamPiece(Piece):
    """Tokens `start` up to `start + S` of a stream."""

    def __init__(self, stream: DomainStream, start: int) -> None:
        self._stream, self._start = stream, start

    @property
    def tokens(self) -> StoredTokens:
        return StoredTokens(self.filled, lambda first, out: self._stream.copy(self._start + first, out))

    @property
    def starts(self) -> np.ndarray:
        return self._stream.document_starts(self._start, self.filled)

    @property
    def filled(self) -> int:
        return self._stream.seq_length + 1

    @property
    def cut(self) -> tuple[bool, bool]:
        return not self._starts_document(self._start), not self._starts_document(self._start + self._stream.seq_length)

    def _starts_document(self, token: int) -> bool:
        return token == 0 or len(self._stream.document_starts(token - 1, 2)) == 2
