"""The learning rate of every step, against torch's own schedulers; and that every step learns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from megalong.config.schema import Config
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool

HIGH = 2e-3
CASES = list(itertools.product((1, 2, 3, 8, 50), (0, 1, 2, 7), (0.0, 1e-4)))


def settings(steps: int, **optimizer: Any) -> dict[str, Any]:
    tree = run_settings(Path("run"), Path("hf"), Path("data"), training={"train_iters": steps})
    tree["optimizer"] = {"lr": HIGH, **optimizer}
    return tree


def torchs(steps: int, warmup: int, low: float) -> list[float]:
    """Torch's linear warm-up to the rate and its cosine from there to `low`: at the last step, or after it where 0."""
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=HIGH)
    warmup = max(warmup, 1)
    rising = LinearLR(adamw, start_factor=1 / warmup, total_iters=warmup - 1)
    falling = CosineAnnealingLR(adamw, T_max=max(steps + (low == 0) - warmup, 1), eta_min=low)
    # The last step of the warm-up is the first of the cosine.
    scheduler = SequentialLR(adamw, [rising, falling], milestones=[warmup - 1]) if warmup > 1 else falling
    rates = []
    for _ in range(steps):
        rates.append(adamw.param_groups[0]["lr"])
        adamw.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_every_rate_is_that_of_torchs_schedulers(pool: WorkerPool) -> None:
    cases = [(steps, warmup, low) for steps, warmup, low in CASES if warmup < steps]
    many = [settings(steps, warmup_iters=warmup, min_lr=low) for steps, warmup, low in cases]
    for case, ours in zip(cases, pool.run(1, "tests.training.workers:learning_rates", many)[0], strict=True):
        assert ours == pytest.approx(torchs(*case), rel=1e-9), case
        assert min(ours) > 0, case
        assert max(ours) == pytest.approx(HIGH), case


def test_the_documented_rates_and_a_constant_one(pool: WorkerPool) -> None:
    many = [
        settings(8, warmup_iters=2, min_lr=1e-4),
        settings(4, warmup_iters=2, lr_schedule="constant"),
        settings(1, lr_schedule="constant"),
    ]
    cosine, constant, one = pool.run(1, "tests.training.workers:learning_rates", many)[0]
    assert [f"{rate:.3g}" for rate in cosine[4:]] == ["0.00105", "0.000575", "0.000227", "0.0001"]
    assert constant == [HIGH / 2, HIGH, HIGH, HIGH]
    assert one == [HIGH]


def test_one_step_learns(pool: WorkerPool, tmp_path: Path) -> None:
    """AdamW's first update moves a weight by the rate times the sign of its gradient, but for eps."""
    tree = run_settings(tmp_path / "run", make_llama(tmp_path / "llama"), make_dataset(tmp_path / "data"))
    tree["training"]["train_iters"] = 1
    tree["optimizer"] = {"lr": HIGH, "weight_decay": 0.0}
    moved = pool.run(1, "tests.training.workers:largest_move", tree)[0]
    assert moved == pytest.approx(HIGH, rel=1e-3)


@pytest.mark.parametrize("warmup", [3, 4])
def test_a_warmup_that_never_ends_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match=rf"optimizer.warmup_iters {warmup} must be below training.train_iters 3"):
        Config.model_validate(settings(3, warmup_iters=warmup))
