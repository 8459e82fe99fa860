"""Which samples a rank reads, and when: a formula of a few whole numbers, which are the loader's whole state.

Global batch t consists of samples t·B … t·B + B - 1. Data-parallel rank r of D runs the micro-batches r, r + D, r + 2D,
… of it, so the global batch is the same for any D, and the position in the data is the one number `consumed_samples`. A
rank counts its micro-batches from where it starts. The i-th is a formula, so any number of readers may read ahead, and
a resumed run starts them anew.

    B 8, micro-batches of 2, D 2, rank 1, start 8       0: 10 11   1: 14 15   2: 18 19   3: 22 23   …
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SampleOrder:
    """The micro-batches of one data-parallel rank from sample `start` on.

    Attributes:
        start: the first sample of a global batch.
        global_batch_size, micro_batch_size: in samples.
        replica, replicas: data-parallel rank r of D.
        period: number of global batches after which the order repeats, as in held-out evaluation; None: never.
    """

    start: int
    global_batch_size: int
    micro_batch_size: int
    replica: int = 0
    replicas: int = 1
    period: int | None = None

    @property
    def count(self) -> int:
        """Micro-batches per global batch on this rank."""
        return self.global_batch_size // (self.micro_batch_size * self.replicas)

    def from_sample(self, start: int) -> SampleOrder:
        """The same order, starting at another global batch."""
        return replace(self, start=start)

    def samples(self, i: int) -> range:
        """The samples of this rank's i-th micro-batch."""
        batch, index = divmod(i, self.count)
        first = self.start + batch * self.global_batch_size
        if self.period is not None:
            first %= self.period * self.global_batch_size
        first += (index * self.replicas + self.replica) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
