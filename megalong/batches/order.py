"""Which samples a rank reads and when: arithmetic on a few whole numbers, the whole state of a loader.

Global batch t is samples t·B … t·B + B - 1. Data-parallel rank r of D takes the micro-batches r, r + D, r + 2D, … of
that batch, so the same global batch is trained on whatever D is, and the position in the data is the one number
`consumed_samples`. A rank counts its micro-batches from where it starts; the i-th is a formula, so readers may work
ahead, in any number, and a resumed run starts them anew.

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
        period: global batches after which they come again from sample 0, as in held-out evaluation; None: never.
    """

    start: int
    global_batch_size: int
    micro_batch_size: int
    replica: int = 0
    replicas: int = 1
    period: int | None = None

    @property
    def count(self) -> int:
        """Micro-batches this rank runs for one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.replicas)

    def from_sample(self, start: int) -> SampleOrder:
        """The same from another global batch on."""
        return replace(self, start=start)

    def samples(self, i: int) -> range:
        """The samples of this rank's i-th micro-batch."""
        batch, index = divmod(i, self.count)
        first = self.start + batch * self.global_batch_size
        if self.period is not None:
            first %= self.period * self.global_batch_size
        first += (index * self.replicas + self.replica) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
