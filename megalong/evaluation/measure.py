"""Losses by position of one model: every rank holds the whole model and its context-parallel share of each sequence.

Imported only in a process that `runtime.distributed.start` has prepared, because it imports the model.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
import torch.distributed as dist

from megalong.attention.layout import TokenLayout
from megalong.batches.context_shard import ContextShard
from megalong.batches.micro_batch import make_micro_batch
from megalong.checkpoint.store import load_weights
from megalong.data.samples.sample import Sample
from megalong.data.samples.sampler import PackedSamples
from megalong.evaluation.buckets import PositionLoss
from megalong.evaluation.forward import forward_losses
from megalong.evaluation.source import ModelSource, beyond_trained
from megalong.hf.load import fill
from megalong.hf.reader import HFReader
from megalong.model.build import build_model
from megalong.model.config import ModelSettings
from megalong.runtime.grid import Grid

REPORTS = 8  # progress lines of a measurement
log = logging.getLogger("megalong")


def load_model(source: ModelSource, context_parallel: int = 1) -> list[torch.nn.Module]:
    """The whole model on this rank, in the dtype of `source`."""
    dtype = getattr(torch, source.architecture.torch_dtype)
    log.info("%s computes in %s, %s", source, source.architecture.torch_dtype, source.why)
    settings = ModelSettings(Grid(context=context_parallel), params_dtype=dtype, lora=source.lora)
    chunks = build_model(source.architecture, settings)
    if source.checkpoint is not None:
        load_weights(source.checkpoint, chunks)
        return chunks
    assert source.hf is not None
    with HFReader(source.hf) as reader:
        fill(chunks, reader, source.architecture)
    return chunks


def measure_losses(source: ModelSource, packed: PackedSamples, samples: int, device: torch.device) -> PositionLoss:
    """Losses of the first `samples` sequences, summed over the world; every rank calls it and gets the sums."""
    world, rank = dist.get_world_size(), dist.get_rank()
    chunks = load_model(source, world)
    log.info("measuring %s: rope %s, %d tokens per sample", source, source.architecture.rope.type, packed.seq_length)
    if rank == 0 and (warning := beyond_trained(source, packed.seq_length, "--seq-length")) is not None:
        log.warning(warning)
    positions, share = PositionLoss(packed.seq_length), ContextShard(TokenLayout(world), rank)
    started = time.monotonic()
    for k in range(samples):
        whole = Sample(packed.row(k).tokens, np.zeros(1, np.int64), packed.seq_length + 1)
        forward_losses(chunks, [make_micro_batch([whole], share).to(device)], positions)
        if (k + 1) * REPORTS // samples > k * REPORTS // samples:
            pace = (k + 1) * packed.seq_length / (time.monotonic() - started)
            log.info("sample %d/%d | %.0f tok/s", k + 1, samples, pace)
    positions.reduce(None, device)
    return positions
