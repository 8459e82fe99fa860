"""Context-parallel attention, forward and backward: the cost of the exchange, and the saving of a document mask.

The same tokens, heads and cores twice: one process with the whole sequence and two threads, and two processes with one
thread and half of the sequence each, which exchange keys or heads over gloo. They run in turn, so a drift of the
machine's speed slows both. A figure is the best time of the one over the best time of the other: 1.0 would be an
exchange without cost.

    document_mask_efficiency   (attended pairs / causal pairs) / (masked time / causal time), in two processes, for
                               log-normal documents with a median of 4,000 tokens, with the exchange that
                               `attention.exchange: auto` chooses here; the table has shorter ones and the ring too
    rope_share_32k             rotary embedding of queries and keys, forward and backward, over attention, one process

The ideal value of all of them is 1 (0 for the share). They stay below it because of messages, the merging of blocks,
and waiting for the slower process. Short documents are limited by the CPU kernel itself, with tiles of 256 x 512: a
causal block of 1,000 tokens takes half as long again per pair as one of 16,000.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import Report

HEADS, GROUPS, HEAD_DIM = 2, 2, 64
LENGTHS = {"16k": 1 << 14, "32k": 1 << 15}
EXCHANGES = ("ring", "all_gather", "ulysses")
TURNS = 4
MEDIANS = (1000, 2000, 4000)
RANKS = 2


@dataclass(frozen=True)
class Job:
    """One measurement: attention over `length` tokens, masked or not, by an exchange (None: alone), or rotary."""

    length: int
    exchange: str | None = None
    documents: int | None = None  # their median length
    rotary: bool = False


def run() -> Report:
    """Measure; see the module for the figures."""
    with tempfile.TemporaryDirectory() as folder:
        alone = _Team(1, threads=RANKS, store=f"{folder}/alone")
        pair = _Team(RANKS, threads=1, store=f"{folder}/pair")
        best: dict[Job, float] = {}
        for turn in range(-1, TURNS):
            for job, team in _jobs(alone, pair):
                if turn < 0 and job.length > min(LENGTHS.values()):
                    continue  # the first turn warms up
                seconds = team.seconds(job)
                if turn >= 0:
                    best[job] = min(best.get(job, seconds), seconds)
        alone.stop()
        pair.stop()
    figures = _figures(best)
    return Report({name: round(value, 4) for name, value in figures.items()}, _table(best, figures))


def _jobs(alone: _Team, pair: _Team) -> list[tuple[Job, _Team]]:
    jobs: list[tuple[Job, _Team]] = []
    for length in LENGTHS.values():
        jobs.append((Job(length), alone))
        jobs += [(Job(length, exchange), pair) for exchange in EXCHANGES]
    jobs += [(Job(LENGTHS["16k"], exchange, median), pair) for exchange in ("ring", _auto()) for median in MEDIANS]
    jobs.append((Job(LENGTHS["32k"], rotary=True), alone))
    return jobs


def _figures(best: dict[Job, float]) -> dict[str, float]:
    figures = {
        f"{exchange}_efficiency_{name}": best[Job(length)] / best[Job(length, exchange)]
        for exchange in EXCHANGES
        for name, length in LENGTHS.items()
    }
    figures["document_mask_efficiency"] = _mask_efficiency(best, _auto(), MEDIANS[-1])
    figures["rope_share_32k"] = best[Job(LENGTHS["32k"], rotary=True)] / best[Job(LENGTHS["32k"])]
    return figures


def _auto() -> str:
    from megalong.config.exchange import choose_exchange

    return choose_exchange("auto", None, RANKS, LENGTHS["16k"] // RANKS, HEADS, GROUPS).name


def _mask_efficiency(best: dict[Job, float], exchange: str, median: int) -> float:
    length = LENGTHS["16k"]
    lengths = np.diff(_starts(length, median), append=length)
    pairs = float((lengths * (lengths + 1)).sum() / (length * (length + 1)))
    return pairs / (best[Job(length, exchange, median)] / best[Job(length, exchange)])


def _starts(length: int, median: int) -> np.ndarray:
    """First tokens of documents with the lengths of a corpus: log-normal."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), 1.0, size=length).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    return starts[starts < length]


class _Team:
    """Processes that measure a job together."""

    def __init__(self, size: int, threads: int, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, rank, size, threads, store), daemon=True).start()
            self._pipes.append(pipe)

    def seconds(self, job: Job) -> float:
        """Time until the slowest process is done."""
        for pipe in self._pipes:
            pipe.send(job)
        return max(float(pipe.recv()) for pipe in self._pipes)

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)


def _serve(pipe: Connection, rank: int, size: int, threads: int, store: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        work = _rotary_work(job) if job.rotary else _attention_work(job, rank, size)
        dist.barrier()
        started = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - started)
    dist.destroy_process_group()


def _attention_work(job: Job, rank: int, size: int) -> Callable[[], Any]:
    from megalong.attention.exchange import ContextGroups, context_attention
    from megalong.attention.kernels import choose_kernel
    from megalong.attention.layout import TokenLayout
    from megalong.attention.plan import make_plan

    layout = TokenLayout(size, "balanced" if job.documents else "zigzag")
    plan = make_plan(layout, job.length, [_starts(job.length, job.documents)] if job.documents else None)
    world = dist.group.WORLD
    groups = ContextGroups()
    if job.exchange == "ulysses":
        groups = ContextGroups(heads=world)
    elif job.exchange is not None:
        groups = ContextGroups(keys=world, transport=job.exchange)  # type: ignore[arg-type]
    q, k, v = _tensors(job.length // size, rank)

    def work() -> None:
        out = context_attention(q, k, v, plan, groups, choose_kernel(q), HEAD_DIM**-0.5)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return work


def _rotary_work(job: Job) -> Callable[[], Any]:
    from megalong.config.rope import RopeSettings
    from megalong.rope import apply_rotary, cos_sin, inverse_frequencies

    q, k, _ = _tensors(job.length, 0)
    frequencies = inverse_frequencies(RopeSettings(rope_theta=500000.0), HEAD_DIM)

    def work() -> None:
        cos, sin = cos_sin(frequencies, torch.arange(job.length))
        rotated = [apply_rotary(t, cos, sin) for t in (q, k)]
        torch.autograd.grad(rotated, (q, k), [torch.ones_like(t) for t in rotated])

    return work


def _tensors(tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, 1, heads, HEAD_DIM, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def _table(best: dict[Job, float], figures: dict[str, float]) -> str:
    lines = [
        f"attention forward + backward, fp32, {HEADS} heads of {HEAD_DIM}, best of {TURNS} turns",
        "",
        "tokens   1 process x 2 threads" + "".join(f"{name:>14}" for name in EXCHANGES) + "   (2 processes x 1 thread)",
    ]
    for name, length in LENGTHS.items():
        row = "".join(f"{best[Job(length, exchange)]:12.2f} s" for exchange in EXCHANGES)
        lines.append(f"{name:>6} {best[Job(length)]:21.2f} s" + row)
    lines.append("")
    for exchange in ("ring", _auto()):
        shares = ", ".join(f"{median:,}: {_mask_efficiency(best, exchange, median):.3f}" for median in MEDIANS)
        lines.append(f"share of the ideal, by median length of documents, 16k tokens, {exchange}: {shares}")
    lines += ["", *(f"{name:28} {value:.3f}" for name, value in figures.items())]
    return "\n".join(lines)
