"""Reading samples of a million tokens against memcpy, and how long training waits for its batches.

Reading: one context-parallel rank's tokens (zigzag) of naive samples, in their stored type, from a dataset in the page
cache, against a contiguous copy of as many bytes from the same mapped file. The two alternate for each sample, and both
end in a new array. Shorter documents mean more pieces at different places of the file, and finding a sample costs the
same for a quarter of it as for all of it: the rows show both. The figure is for the longest documents and whole
samples.

Waiting: steps of a small Llama in one process on the same data; the share of a step's time spent waiting for its batch,
without the first step.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Report

SEQUENCE, RANKS, SAMPLES = 1 << 20, (4, 1), 60
TOKENS = 64 << 20
MEDIANS = (4096, 32768, 262144)  # tokens of a document
STEPS, STEP_SEQUENCE = 6, 8192


def run() -> Report:
    """Measure both."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for median in MEDIANS:
            prefix = Path(name) / f"documents-{median}"
            _write(prefix, median)
            rows += [(median, ranks, *_reading(prefix, ranks)) for ranks in RANKS]
        wait = _waiting(Path(name), Path(name) / f"documents-{MEDIANS[0]}")
    figures = {"share_of_memcpy": round(rows[-1][2] / rows[-1][3], 3), "wait_share": round(wait, 5)}
    return Report(figures, _table(rows, wait))


def _table(rows: list[tuple[int, int, float, float]], wait: float) -> str:
    lines = [
        f"samples of {SEQUENCE:,} tokens of 4 bytes; {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f} at the end",
        "",
        f"{'median document':>16}{'CP':>4}{'read GB/s':>12}{'memcpy GB/s':>13}{'share':>8}",
        *(f"{median:16,}{ranks:4}{ours:12.1f}{copy:13.1f}{ours / copy:8.2f}" for median, ranks, ours, copy in rows),
        "",
        f"waiting for data: {wait:.3%} of a step of {STEP_SEQUENCE:,} tokens",
    ]
    return "\n".join(lines)


def _write(prefix: Path, median: int) -> None:
    """A dataset of about TOKENS tokens in documents of log-normal length."""
    from megalong.data.indexed_writer import IndexedDatasetWriter

    random, left = np.random.default_rng(0), TOKENS
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        while left > 0:
            length = min(left, max(2, int(median * random.lognormal(0, 1.0))))
            writer.add_document(random.integers(0, 1000, length, np.int32))
            left -= length
        writer.finish()


def _reading(prefix: Path, ranks: int) -> tuple[float, float]:
    """GB/s of a rank's reader and of memcpy, medians over samples; each file has been read once before."""
    from megalong.attention.layout import TokenLayout
    from megalong.batches.context_shard import ContextShard
    from megalong.config.mixture import Domain
    from megalong.data.samples.sampler import PackedSamples

    packed = PackedSamples([Domain(name="a", path=str(prefix), weight=1.0)], SEQUENCE, 1, "99,1")
    tokens = packed.streams[0].dataset.read(0, packed.streams[0].dataset.num_tokens)
    share, runs = ContextShard(TokenLayout(ranks)), TokenLayout(ranks).runs(SEQUENCE, np.zeros(1, np.int64))[0]
    count = SEQUENCE // ranks + len(runs)
    int(tokens.sum())  # into the page cache and this process's page tables
    ours, copy = [], []
    for k in range(SAMPLES):
        ours.append(_seconds(lambda: share.read(packed.read(k), runs, packed.token_type)))  # noqa: B023
        first = k * 7919 * 4096 % (len(tokens) - count)
        copy.append(_seconds(lambda: tokens[first : first + count].copy()))  # noqa: B023
    return 4e-9 * count / statistics.median(ours), 4e-9 * count / statistics.median(copy)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _waiting(folder: Path, prefix: Path) -> float:
    """The share of STEPS training steps' time that is spent waiting for batches."""
    import torch

    from megalong.config.schema import Config
    from megalong.runtime import distributed

    config = Config.model_validate(
        {
            "run": {"name": "loader", "dir": str(folder / "run")},
            "model": {"architecture": _architecture()},
            "data": {"seq_length": STEP_SEQUENCE, "mixture": [{"name": "a", "path": str(prefix), "weight": 1.0}]},
            "precision": {"params_dtype": "fp32"},
            "optimizer": {"lr": 1e-4, "lr_schedule": "constant"},
            "training": {"train_iters": STEPS, "global_batch_size": 1},
        }
    )
    distributed.start(torch.device("cpu"))
    try:
        from functools import partial

        from megalong.batches.loader import Batches
        from megalong.batches.open_samples import open_samples
        from megalong.training.setup import set_up
        from megalong.training.step import TrainStep

        session = set_up(config, torch.device("cpu"))
        batches = Batches(config, partial(open_samples, config, "train", None, None), session.device)
        step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        spent = [step.run(batches, k).seconds for k in range(STEPS)][1:]
        batches.close()
    finally:
        distributed.stop()
    return sum(one["data"] for one in spent) / sum(sum(one.values()) for one in spent)


def _architecture() -> dict[str, Any]:
    return {
        "num_layers": 2,
        "hidden_size": 256,
        "ffn_hidden_size": 768,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 32,
        "vocab_size": 1024,
        "max_position_embeddings": STEP_SEQUENCE,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "rope": {"rope_theta": 10000.0},
    }
