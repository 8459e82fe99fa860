"""Ten steps are those of a plain transformers Llama under torch's AdamW: the reference that shares no code with ours.

What is written out here again, from its definition and not by calling ours: the mean loss over the global batch,
clipping by the global norm, warm-up and cosine, and that norms are not decayed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation
from tests.training.gradients import global_batches, plain_llama, plain_loss

STEPS = 10


def learning_rate(iteration: int, optimizer: dict[str, Any]) -> float:
    """Of iteration 1, 2, ... 10: linear up to `lr`, then half a cosine that reaches `min_lr` at iteration 10."""
    warmup, high, low = optimizer["warmup_iters"], optimizer["lr"], optimizer["min_lr"]
    if iteration <= warmup:
        return high * iteration / warmup
    done = (iteration - warmup) / (STEPS - warmup)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def plain_adamw(model: Any, options: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW as the run's settings describe it."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=options["adam_eps"],
    )


def set_learning_rate(adamw: torch.optim.AdamW, iteration: int, options: dict[str, Any]) -> None:
    """Of iteration 1, 2, ... 10."""
    for group in adamw.param_groups:
        group["lr"] = learning_rate(iteration, options)


def plain_steps(llama: Path, settings: dict[str, Any], attention: str) -> dict[str, list[float]]:
    """Loss and gradient norm before clipping of ten steps of transformers and torch."""
    model, options = plain_llama(llama, attention), settings["optimizer"]
    adamw = plain_adamw(model, options)
    results: dict[str, list[float]] = {"loss": [], "norm": []}
    for iteration, batch in enumerate(global_batches(settings), 1):
        adamw.zero_grad()
        loss = plain_loss(model, batch)
        loss.backward()
        results["loss"].append(loss.item())
        results["norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        set_learning_rate(adamw, iteration, options)
        adamw.step()
    return results


@pytest.mark.parametrize(("model", "attention"), [("untied", "eager"), ("tied", "sdpa")])
def test_ten_steps_are_those_of_plain_transformers(
    model: str, attention: str, tmp_path: Path, pool: WorkerPool
) -> None:
    llama = make_llama(tmp_path / model, tie_word_embeddings=model == "tied")
    settings = run_settings(tmp_path / "run", llama, make_dataset(tmp_path / "data"))
    plain = plain_steps(llama, settings, attention)
    ours = pool.run(1, "tests.training.workers:train_steps", settings, STEPS)
    assert min(plain["norm"]) > 1  # every step is clipped
    assert deviation(ours, plain) <= TOLERANCE["fp32"]
    # Equal numbers prove nothing if nothing moves: without the steps the last loss would have been another.
    *_, last = global_batches(settings)
    with torch.no_grad():
        untrained = plain_loss(plain_llama(llama), last).item()
    assert abs(untrained - plain["loss"][-1]) > 1e-3
