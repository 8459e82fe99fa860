"""Turn packed samples into this rank's micro-batches, in the background while the previous step runs.

    consumed samples ─ order.py ─▶ sample numbers ─▶ documents ─ attention/plan.py ─▶ this rank's runs
                       ─ context_shard.py ─▶ tokens of those runs, as stored ─ micro_batch.py ─▶ MicroBatch

A context-parallel rank reads its own tokens and the token after each of its runs, so the ranks of a group together read
a sample about once. A pipeline stage between the first and the last reads none: it needs document bounds and positions
only. Tensor-parallel ranks read the same tokens, from the page cache of their node.

With `data.loader: dali`, DALI's processes read the tokens. Everything else is still computed here, so both loaders
return the same micro-batches for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megalong.attention.layout import TokenLayout
from megalong.attention.plan import AttentionPlan
from megalong.batches.context_shard import ContextShard
from megalong.batches.dali import DaliTokens, Reader
from megalong.batches.micro_batch import MicroBatch, batch_of, read_tokens
from megalong.batches.order import SampleOrder
from megalong.batches.prefetcher import Prefetcher
from megalong.batches.skipped_samples import Remaining
from megalong.config.schema import Config
from megalong.data.samples.sample import Sample, SampleSource
from megalong.runtime import distributed
from megalong.runtime.gpus import use

Item = tuple[MicroBatch, int, int]  # (batch, bytes of tokens read, bytes of its whole samples)


class Batches:
    """This rank's share of every global batch.

    Args:
        samples: opens the samples; DALI's processes call it too, so it must be picklable.
        window: the model's widest window, with which balanced layouts count attended pairs.
        period: number of global batches after which the order repeats; None: never.

    Attributes:
        bytes_read: bytes of tokens read for the micro-batches returned so far.
        bytes_whole: bytes of the whole samples of these micro-batches.
    """

    def __init__(
        self,
        config: Config,
        samples: Callable[[], SampleSource],
        device: torch.device,
        window: int | None = None,
        period: int | None = None,
    ) -> None:
        self.samples = samples()
        self.bytes_read = self.bytes_whole = 0
        self._open, self._config, self._device = samples, config, device
        here, grid = distributed.place(), distributed.grid()
        self._shard = shard_of(config, here.context, window)
        self._needs_tokens = here.stage in (0, grid.pipeline - 1)
        # A source that stores no tokens has no token type.
        self._dtype = np.dtype(getattr(self.samples, "token_type", np.int64))
        self._order = SampleOrder(
            0,
            config.training.global_batch_size,
            config.training.micro_batch_size,
            here.data,
            grid.replicas(dist.get_world_size()),
            period,
        )
        self._next: int | None = None
        self._prefetcher: Prefetcher[Item] | None = None
        self._dali: DaliTokens | None = None

    @property
    def count(self) -> int:
        """Micro-batches per global batch on this rank."""
        return self._order.count

    def places(self, consumed_samples: int, replicas: Iterable[int]) -> tuple[int, ...]:
        """Positions in the sample order that `replicas` read for the global batch at `consumed_samples`."""
        orders = (replace(self._order, start=consumed_samples, replica=replica) for replica in set(replicas))
        numbers = sorted(k for order in orders for index in range(self.count) for k in order.samples(index))
        place = self.samples.skipped_samples.place if isinstance(self.samples, Remaining) else int
        return tuple(place(number) for number in numbers)

    def at(self, consumed_samples: int) -> list[MicroBatch]:
        """The micro-batches of the global batch that starts at sample `consumed_samples`.

        The following batches are prefetched. A call for any other batch restarts the prefetcher.
        """
        if self._prefetcher is None or consumed_samples != self._next:
            self.close()
            self._start(consumed_samples)
        assert self._prefetcher is not None
        self._next = self._after(consumed_samples)
        batches = []
        for _ in range(self.count):
            batch, read, whole = self._prefetcher.next()
            self.bytes_read += read
            self.bytes_whole += whole
            batches.append(batch.to(self._device))
        return batches

    def close(self) -> None:
        """Stop prefetching; the next `at` restarts it."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._dali is not None:
            self._dali.close()
        self._prefetcher = self._dali = self._next = None

    def describe(self) -> str:
        """Describe the loader and the share of its samples that this rank has read."""
        data, share = self._config.data, self.bytes_read / max(self.bytes_whole, 1)
        ranks = self._config.parallel.context_parallel_size
        return (
            f"{data.loader} loader, {data.prefetch} steps ahead; this rank has read {self.bytes_read:,} bytes of "
            f"tokens, {share:.2%} of its samples' {self.bytes_whole:,} (context parallel {ranks})"
        )

    def _after(self, consumed_samples: int) -> int:
        size, period = self._order.global_batch_size, self._order.period
        return consumed_samples + size if period is None else (consumed_samples + size) % (period * size)

    def _start(self, consumed_samples: int) -> None:
        data = self._config.data
        order = self._order.from_sample(consumed_samples)
        depth = data.prefetch * self.count
        if data.loader == "dali" and self._needs_tokens:
            reader = Reader(self._open, partial(self._shard.read_alone, self._dtype), order)
            size = order.micro_batch_size
            self._dali = DaliTokens(reader, size, data.workers, max(depth, 1))
            # One thread: DALI returns its batches one after the other.
            self._prefetcher = Prefetcher(partial(self._make, order), depth)
        else:
            self._prefetcher = Prefetcher(partial(self._make, order), depth, data.workers)

    def _make(self, order: SampleOrder, i: int) -> Item:
        """This rank's i-th micro-batch in host memory, pinned if it goes to a GPU."""
        use(self._device)  # in a thread of its own
        rows = [self.samples.read(k) for k in order.samples(i)]
        plan = self._shard.plan(rows)
        own = self._tokens(rows, plan) if self._needs_tokens else None
        batch = batch_of(rows, self._shard, plan, own)
        read = sum(row.numel() * row.element_size() for row in own or ())
        whole = sum(len(row.tokens) for row in rows) * self._dtype.itemsize
        return batch.pinned() if self._device.type == "cuda" else batch, read, whole

    def _tokens(self, rows: list[Sample], plan: AttentionPlan) -> list[torch.Tensor]:
        if self._dali is None:
            return read_tokens(rows, self._shard, plan, self._dtype)
        dtype = torch.from_numpy(np.empty(0, self._dtype)).dtype
        return [row.view(dtype) for row in self._dali.next()]


def shard_of(config: Config, context_rank: int, window: int | None = None) -> ContextShard:
    """A context-parallel rank's shard of every sample."""
    layout = TokenLayout(config.grid.context, config.token_layout, window)
    return ContextShard(layout, context_rank, config.data.masked, config.length_multiple)
