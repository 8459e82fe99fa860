"""One training step (forward, backward, clipping, AdamW) of a small Llama: megalong against transformers.

Both train the same weights on the same tokens in fp32 with torch's fused AdamW, each in its own process with all cores.
They run in turn, a few steps each, and the ratio is computed for each turn, so a drift of the machine's speed slows
both. Our step is that of a cluster run: Megatron-Core's layers and schedule, its gradient buffers and distributed
optimizer, the CPU adapter, and rotary embeddings computed for each micro-batch.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import Report

SEQUENCE, BATCH, VOCABULARY = 512, 4, 4096
STEPS, TURNS = 4, 9
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQUENCE,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
Step = Callable[[], float]


def run() -> Report:
    """Measure; the figure is tokens/s of megalong over tokens/s of transformers, median over turns."""
    with tempfile.TemporaryDirectory() as folder:
        _make_llama(Path(folder))
        theirs, ours = _Side(_transformers_step, folder), _Side(_megalong_step, folder)
        for side in (theirs, ours):
            side.measure()  # warm-up
        times = [(theirs.measure(), ours.measure()) for _ in range(TURNS)]
        profile = ours.ask("profile")
        losses = theirs.ask("loss"), ours.ask("loss")
        for side in (theirs, ours):
            side.stop()
    ratio = statistics.median(their / our for their, our in times)
    return Report({"ratio_vs_transformers": round(ratio, 3)}, _table(times, ratio, losses, profile))


def _make_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)


def _samples() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))


def _transformers_step(folder: str) -> Step:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True, **OPTIMIZER)  # type: ignore[arg-type]
    samples = _samples()

    def step() -> float:
        logits = model(samples[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _megalong_step(folder: str) -> Step:
    from megalong.config.schema import Config
    from megalong.runtime import distributed

    config = Config.model_validate(
        {
            "run": {"name": "benchmark", "dir": f"{folder}/run"},
            "model": {"load": {"hf": folder}},
            "data": {"seq_length": SEQUENCE, "mixture": [{"name": "none", "path": "none", "weight": 1.0}]},
            "precision": {"params_dtype": "fp32"},
            "optimizer": {"lr": OPTIMIZER["lr"], "lr_schedule": "constant"},
            "training": {"train_iters": 10**6, "micro_batch_size": BATCH, "global_batch_size": BATCH},
        }
    )
    device = torch.device("cpu")
    distributed.start(device)
    from megalong.batches.loader import Batches
    from megalong.data.samples.sample import Sample
    from megalong.training.setup import set_up
    from megalong.training.step import TrainStep

    session = set_up(config, device)
    rows = list(_samples().numpy())

    class Fixed:
        seq_length = SEQUENCE

        def read(self, k: int) -> Sample:
            return Sample(rows[k % BATCH], np.zeros(1, np.int64), SEQUENCE + 1)

        def describe(self, samples: int) -> list[object]:
            return []

        def prepare(self, first: int, last: int) -> None:
            pass

    batches = Batches(config, Fixed, device)
    train = TrainStep(session.chunks, session.optimizer, session.scheduler)
    consumed = itertools.count(0, BATCH)
    return lambda: train.run(batches, next(consumed)).loss


class _Side:
    """A process that runs steps on request."""

    def __init__(self, make: Callable[[str], Step], folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, folder, theirs))
        self._process.start()

    def measure(self) -> float:
        """Seconds per step, averaged over STEPS steps."""
        return float(self.ask("steps"))

    def ask(self, what: str) -> Any:
        """Send a request and wait for its answer."""
        self._pipe.send(what)
        return self._pipe.recv()

    def stop(self) -> None:
        """End the process."""
        self._pipe.send("stop")
        self._process.join()


def _serve(make: Callable[[str], Step], folder: str, pipe: Connection) -> None:
    step = make(folder)
    loss = 0.0
    while (what := pipe.recv()) != "stop":
        if what == "steps":
            started = time.perf_counter()
            for _ in range(STEPS):
                loss = step()
            pipe.send((time.perf_counter() - started) / STEPS)
        elif what == "loss":
            pipe.send(loss)
        else:
            pipe.send(_profile(step))


def _profile(step: Step) -> list[tuple[str, float]]:
    """The operations that take the most time of a step, with their shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    top = sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
    return [(event.key, event.self_cpu_time_total / total) for event in top]


def _table(
    times: list[tuple[float, float]], ratio: float, losses: tuple[float, float], profile: list[tuple[str, float]]
) -> str:
    def rate(seconds: float) -> str:
        return f"{BATCH * SEQUENCE / seconds:10,.0f}"

    their, our = (statistics.median(column) for column in zip(*times, strict=True))
    lines = [
        f"training step, {BATCH} x {SEQUENCE} tokens, fp32, {os.cpu_count()} cores, {TURNS} turns of {STEPS} steps",
        "",
        "              tokens/s    ms/step   loss",
        f"transformers {rate(their)} {1000 * their:10.1f}   {losses[0]:.4f}",
        f"megalong     {rate(our)} {1000 * our:10.1f}   {losses[1]:.4f}",
        f"ratio_vs_transformers {ratio:.3f} (median of turns; {min(t / o for t, o in times):.3f} to "
        f"{max(t / o for t, o in times):.3f})",
        "",
        "where megalong's time goes:",
        *(f"  {share:6.1%}  {name}" for name, share in profile),
    ]
    return "\n".join(lines)
