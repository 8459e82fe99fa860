"""What a rank runs in the tests of loaders: `Batches` under a layout of ranks, without a model."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megalong.config.schema import Config
from megalong.runtime import distributed
from megalong.runtime.grid import Grid

NAMES = ("tokens", "labels", "loss_mask", "positions")


@contextmanager
def _batches(settings: dict[str, Any]) -> Iterator[Any]:
    distributed.start(torch.device("cpu"))
    from megalong.batches.loader import Batches
    from megalong.batches.open_samples import open_samples

    # DALI's loader starts processes, which a daemon such as a worker of the pool may not.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    config = Config.model_validate(settings)
    parallel = config.parallel
    layout = Grid(
        tensor=parallel.tensor_model_parallel_size,
        context=parallel.context_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
    )
    distributed.set_grid(layout, config.run.seed, 5.0)
    samples = partial(open_samples, config, "train", None, Path(config.run.dir) / "index")
    batches = Batches(config, samples, torch.device("cpu"))
    try:
        yield batches
    finally:
        batches.close()
        distributed.clear_grid()


def against_whole_samples(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Compare `steps` global batches with those cut out of whole samples; returns what was read, and from where."""
    from megalong.data.indexed import IndexedDataset
    from tests.training.whole_samples import cut

    read: list[int] = []
    right = IndexedDataset.gather

    def counting(self: Any, starts: Any, lengths: Any, out: Any) -> None:
        read.append(int(lengths.sum()) * self.dtype.itemsize)
        right(self, starts, lengths, out)

    with _batches(settings) as batches:
        config, order, share = batches._config, batches._order, batches._shard
        size = config.training.global_batch_size
        different = []
        with patch.object(IndexedDataset, "gather", counting):
            made = [batches.at(step * size) for step in range(steps)]
            batches.close()
        gathered = sum(read)
        for step, micro_batches in enumerate(made):
            for index, batch in enumerate(micro_batches):
                numbers = order.from_sample(step * size).samples(index)
                rows = [batches.samples.read(k) for k in numbers]
                expected = cut(rows, share.layout, share.context_rank, share.masked, share.multiple)
                for name in NAMES if batches._needs_tokens else NAMES[2:]:
                    found = getattr(batch, name)
                    wanted = expected[name]
                    if name == "positions" and len(found) == 1:
                        wanted = wanted[:1]
                    if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                        different.append((step, index, name))
        return {
            "different": different,
            "read": batches.bytes_read,
            "whole": batches.bytes_whole,
            "gathered": gathered,
            "reads": batches._needs_tokens,
        }


def against_each(many: Sequence[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """`against_whole_samples` of one setting after the other."""
    return [against_whole_samples(settings, steps) for settings in many]


def digests_of_each(many: Sequence[dict[str, Any]], visits: Sequence[tuple[int, int]]) -> list[list[tuple[int, str]]]:
    """`digests` of one setting after the other."""
    return [digests(settings, visits) for settings in many]


def digests(settings: dict[str, Any], visits: Sequence[tuple[int, int]]) -> list[tuple[int, str]]:
    """(first sample, digest) of this rank's global batches; each visit is a new start: (consumed samples, steps)."""
    found = []
    for consumed, steps in visits:
        with _batches(settings) as batches:
            for step in range(steps):
                first = consumed + step * batches._order.global_batch_size
                found.append((first, _digest(batches.at(first))))
    return found


def tokens_seen(settings: dict[str, Any], consumed: int, steps: int) -> list[tuple[int, int, list[Any]]]:
    """(sample, context rank, [position, token, label, counts]s by row) of all this rank's rows from `consumed` on."""
    found = []
    with _batches(settings) as batches:
        size = batches._order.global_batch_size
        for step in range(steps):
            order = batches._order.from_sample(consumed + step * size)
            for index, batch in enumerate(batches.at(order.start)):
                positions = batch.positions.expand(batch.tokens.shape)
                for row, k in enumerate(order.samples(index)):
                    four = (positions, batch.tokens, batch.labels, batch.loss_mask)
                    rows = torch.stack([values[row].double() for values in four], 1)
                    found.append((k, batches._shard.context_rank, rows.tolist()))
    return found


def _digest(micro_batches: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for batch in micro_batches:
        for name in NAMES:
            digest.update(getattr(batch, name).numpy().tobytes())
        digest.update(repr(batch.document_lengths).encode())
    return digest.hexdigest()
