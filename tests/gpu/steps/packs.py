"""Masked packs of 64K tokens: how often the CPU waits for the GPU in a step, and how long the GPU has nothing to do.

The model is what a TP 8 rank of an 8B model computes, without collectives: there kernels are short and the CPU is
hardest to hide. Beside it the same steps with one document a sample.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.attention import document_starts
from benchmarks.gpu.ours import Documents, OurTraining
from benchmarks.gpu.rows import SIZES

from megalong.config.architecture import Architecture
from megalong.runtime import distributed
from tests.gpu.gpu_time import profiled
from tests.gpu.harness import Trial

ROOT = str(Path(__file__).resolve().parents[3])
RANK = {"num_attention_heads": 4, "num_query_groups": 1, "ffn_hidden_size": 1792}


def run(trial: Trial) -> None:
    """Masked, then whole."""
    tokens = trial.size(1 << 16, 256)
    mean = tokens / 16

    def documents(k: int) -> Any:
        return document_starts(tokens, mean, seed=k)

    cases: dict[str, Documents | None] = {"masked": documents, "whole": None}
    for name, starts in cases.items():
        with trial.part(name):
            _measure(trial, name, tokens, starts)
    distributed.stop()


def _measure(trial: Trial, name: str, tokens: int, documents: Documents | None) -> None:
    shape = SIZES["tiny"] if trial.rehearse else {**SIZES["8b_eighth"], **RANK}
    training = OurTraining(Architecture.model_validate(shape), trial.device, documents)
    for _ in range(2):
        training.step(tokens)
    took = trial.seconds(lambda: training.step(tokens), 3.0)
    trial.figure(f"{name}: ms a step", None if took is None else took * 1e3, headline=True)
    waits = waits_of(lambda: training.step(tokens), trial.device)
    trial.figure(f"{name}: waits a step", None if waits is None else sum(waits.values()), headline=True)
    for place, count in (waits or Counter()).most_common(8):
        trial.figure(f"{name}: waits at {place}", count)
    profile = profiled(lambda: training.step(tokens), trial.device)
    idle = None if profile.idle is None else profile.idle / profile.wall
    trial.figure(f"{name}: idle share", idle, headline=True)
    trial.figure(f"{name}: shares", profile.shares())
    training.close()


def waits_of(work: Callable[[], Any], device: torch.device) -> Counter[str] | None:
    """How often `work` makes the CPU wait for the GPU, by the line that does; None without a GPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [one for one in told if "synchroniz" in str(one.message)]
    return Counter(f"{one.filename.removeprefix(ROOT + '/')}:{one.lineno}" for one in found)
