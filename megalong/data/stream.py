"""The endless token stream of one domain: documents shuffled anew each epoch, laid end to end.

Naive packing: sample j of length S is tokens j·S to (j+1)·S of that stream, both included, so it holds S inputs and,
shifted by one, S targets; neighbours share one token. Documents are cut where a sample ends and go on in the next one.

    epoch 0: documents c a b      c c c a a b b b b | b a a c ...   epoch 1: b a c
    S = 4                        [c c c a a]
                                         [a b b b b]
                                                 [b | b a a c]

Any sample is found without walking the stream: every epoch has the same number of tokens T, so token p lies in epoch
p // T, and a binary search over the running sum of that epoch's lengths gives its document. The order of an epoch is a
function of (seed, domain name, part, epoch), so any rank computes any sample, and resuming needs no state but a number.
"""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from megalong.data.epoch_index import Index, index_key, load_index, save_index
from megalong.data.indexed import IndexedDataset
from megalong.errors import UserError


class DomainStream:
    """Tokens of `documents` (int64, numbers of documents in `dataset`), epoch after epoch.

    Args:
        seed: the run's seed.
        salt: the domain's name and part; streams of different salt are shuffled independently.
        index_folder: where `prepare` leaves the order of an epoch for other ranks; None keeps it in memory.

    Raises:
        UserError: the documents hold no token at all.
    """

    def __init__(
        self, dataset: IndexedDataset, documents: np.ndarray, seed: int, salt: str, index_folder: Path | None = None
    ) -> None:
        self.dataset = dataset
        starts = dataset.document_starts
        lengths = starts[documents + 1] - starts[documents]
        self._starts, self._lengths = starts[documents][lengths > 0], lengths[lengths > 0]
        self.documents = documents[lengths > 0]
        self.tokens_per_epoch = int(self._lengths.sum())
        if self.tokens_per_epoch == 0:
            raise UserError(f"{dataset.prefix}: the {len(documents)} documents of {salt} hold no token")
        self._seed = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, zlib.crc32(salt.encode())]
        # Two epochs are kept: a sample spans a border, and so do the samples of a global batch.
        self._epoch = lru_cache(maxsize=2)(self._indexed)
        self._index_folder = index_folder

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the documents in the order in which `epoch` lays them down."""
        return np.asarray(self.documents[self._epoch(epoch)[0]])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: tokens `start` up to `start + length` of the stream."""
        out = np.empty(length, np.int64)
        filled = 0
        while filled < length:
            epoch, offset = divmod(start + filled, self.tokens_per_epoch)
            filled += self._fill(out[filled:], epoch, offset)
        return out

    def sample(self, j: int, seq_length: int) -> np.ndarray:
        """int64 [seq_length + 1]: packed sample j of this domain."""
        return self.tokens(j * seq_length, seq_length + 1)

    def prepare(self, start: int, end: int) -> None:
        """Write the orders of the epochs that tokens `start` up to `end` lie in, where they are not on disk yet."""
        if self._index_folder is None or end <= start:
            return
        for epoch in range(start // self.tokens_per_epoch, (end - 1) // self.tokens_per_epoch + 1):
            key = index_key(self.dataset, self.documents, self._seed, epoch)
            if load_index(self._index_folder, key) is None:
                save_index(self._index_folder, key, self._shuffled(epoch))

    def _fill(self, out: np.ndarray, epoch: int, offset: int) -> int:
        """Copy tokens of one epoch from `offset` on; returns how many there were, at most len(out)."""
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, offset, side="right"))
        filled = 0
        while filled < len(out) and place < len(order):
            skipped = offset + filled - int(ends[place] - self._lengths[order[place]])
            count = min(len(out) - filled, int(self._lengths[order[place]]) - skipped)
            begin = int(self._starts[order[place]]) + skipped
            out[filled : filled + count] = self.dataset.read(begin, count)
            filled += count
            place += 1
        return filled

    def _indexed(self, epoch: int) -> Index:
        if self._index_folder is None:
            return self._shuffled(epoch)
        key = index_key(self.dataset, self.documents, self._seed, epoch)
        return load_index(self._index_folder, key) or self._shuffled(epoch)

    def _shuffled(self, epoch: int) -> Index:
        """Order of the documents in an epoch, and the token at which each of them ends.

        numpy freezes RandomState's stream for good (NEP 19): a run resumed under another numpy sees the same data.
        """
        order = np.random.RandomState([*self._seed, epoch]).permutation(len(self._lengths))
        return order, np.cumsum(self._lengths[order])
