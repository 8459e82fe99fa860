"""A resumed run learns under the configuration's settings, whatever the checkpoint was trained under, and says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.checkpoint.folder import META, find_checkpoint, read_meta
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.training.start import find_start
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation
from tests.training.gradients import global_batches, plain_llama, plain_loss

TRAIN = "tests.training.workers:train_run"
SAVED = 4
BEFORE = {"lr": 1e-3, "min_lr": 1e-4, "warmup_iters": 2, "adam_eps": 1e-5}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("resume-settings")
    return make_llama(folder / "llama"), make_dataset(folder / "data")


@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": False}], ids=["sharded", "whole"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_longer_run_at_another_rate(
    dtype: str, parallel: dict[str, Any], sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Worked by hand: half a cosine from 2e-3 at step 2 to 1e-4 at step 8, at 3/6, 4/6, 5/6 and 6/6 of its way."""

    def settings(iterations: int, **optimizer: float) -> dict[str, Any]:
        return run_settings(
            tmp_path / "run",
            *sources,
            parallel=parallel,
            precision={"params_dtype": dtype},
            training={"train_iters": iterations},
            optimizer=BEFORE | optimizer,
        )

    pool.run(1, TRAIN, settings(SAVED))
    resumed = pool.run(1, TRAIN, settings(8, lr=2e-3))[0]
    found = {record["step"]: record["learning_rate"] for record in resumed["records"]}
    expected = {5: 1.05e-3, 6: 5.75e-4, 7: 1e-4 + 1.9e-3 * (1 - math.sqrt(0.75)) / 2, 8: 1e-4}
    assert found == pytest.approx(expected, rel=1e-9)


BETAS = {"lr": 3e-3, "min_lr": 3e-3, "adam_beta1": 0.6, "adam_beta2": 0.7}


@pytest.mark.parametrize("optimizer", ["fully_reshardable", "dp_reshardable"])
@pytest.mark.parametrize(
    "after",
    [
        BETAS,
        pytest.param({"adam_eps": 1e-2, "weight_decay": 0.9}, marks=pytest.mark.slow),
        {"lr_schedule": "constant", "clip_grad": 0.25, "warmup_iters": 3},
    ],
    ids=["betas", "eps", "clip"],
)
def test_every_setting_of_the_optimizer_may_change(
    after: dict[str, Any], optimizer: str, sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Eight steps of transformers and torch's AdamW, whose groups are given the later settings before step 5."""

    def settings(iterations: int, **changed: Any) -> dict[str, Any]:
        return run_settings(
            tmp_path / "run",
            *sources,
            training={"train_iters": iterations},
            optimizer=BEFORE | {"lr_schedule": "constant"} | changed,
            checkpoint={"optimizer": optimizer},
        )

    first, second = settings(SAVED), settings(8, **after)
    records = pool.run(1, TRAIN, first)[0]["records"] + pool.run(1, TRAIN, second)[0]["records"]
    ours = {"loss": [r["loss"] for r in records], "norm": [r["gradient_norm"] for r in records]}
    plain = plain_steps(sources[0], second, first["optimizer"])
    assert deviation([ours], plain) <= TOLERANCE["fp32"]


def plain_steps(llama: Path, settings: dict[str, Any], before: dict[str, Any]) -> dict[str, list[float]]:
    model = plain_llama(llama)
    adamw = torch.optim.AdamW(
        [
            {"params": [one for one in model.parameters() if one.ndim > 1], "decayed": True},
            {"params": [one for one in model.parameters() if one.ndim == 1], "decayed": False},
        ],
        lr=1.0,
    )
    results: dict[str, list[float]] = {"loss": [], "norm": []}
    for step, batch in enumerate(global_batches(settings), 1):
        options = {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0}
        options |= before if step <= SAVED else settings["optimizer"]
        assert options["lr_schedule"] == "constant"
        for group in adamw.param_groups:
            group["lr"] = options["lr"] * min(1.0, step / options["warmup_iters"])
            group["betas"] = options["adam_beta1"], options["adam_beta2"]
            group["eps"] = options["adam_eps"]
            group["weight_decay"] = options["weight_decay"] if group["decayed"] else 0.0
        adamw.zero_grad()
        loss = plain_loss(model, batch)
        loss.backward()
        results["loss"].append(loss.item())
        results["norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_grad"]).item())
        adamw.step()
    return results


def test_what_changed_is_said_key_by_key(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    def settings(iterations: int, **optimizer: Any) -> dict[str, Any]:
        return run_settings(
            tmp_path / "run", *sources, training={"train_iters": iterations}, optimizer=BEFORE | optimizer
        )

    start = "tests.training.workers:start_run"
    pool.run(1, TRAIN, settings(SAVED))
    log = tmp_path / "run" / "log.txt"
    pool.run(1, start, settings(SAVED))
    assert "changed since" not in log.read_text()
    pool.run(1, start, settings(8, lr=2e-3, adam_beta2=0.99, clip_grad=0.5, lr_schedule="constant"))
    (line,) = [line for line in log.read_text().splitlines() if "changed since" in line]
    for told in (
        "optimizer.lr 0.001 → 0.002",
        "optimizer.adam_beta2 0.95 → 0.99",
        "optimizer.clip_grad 1.0 → 0.5",
        "optimizer.lr_schedule cosine → constant",
        "training.train_iters 4 → 8",
        "apply from step 5 on",
    ):
        assert told in line
    assert "min_lr" not in line

    checkpoint = find_checkpoint(tmp_path / "run")
    older = read_meta(checkpoint).model_dump(mode="json", exclude={"settings", "checksums", "files"})
    (checkpoint / META).write_text(json.dumps(older))
    (checkpoint / f"{META}.crc32").unlink()
    pool.run(1, start, settings(8, lr=2e-3))
    assert "step 4 does not record its optimizer settings" in log.read_text()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            {"parallel": {"use_distributed_optimizer": False}},
            {"parallel": {"use_distributed_optimizer": True}},
            r"parallel\.use_distributed_optimizer true: .*write false, or start a new run\.dir",
        ),
        (
            {"checkpoint": {"optimizer": "dp_reshardable"}},
            {"precision": {"params_dtype": "bf16"}},
            r"precision\.params_dtype bf16: .*write fp32, or start a new run\.dir",
        ),
    ],
    ids=["form", "type"],
)
def test_a_state_of_another_form_is_refused_by_name(
    before: dict[str, Any],
    after: dict[str, Any],
    told: str,
    sources: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    pool.run(1, TRAIN, run_settings(tmp_path / "run", *sources, training={"train_iters": 3}, **before))
    with pytest.raises(UserError, match=told):
        find_start(Config.model_validate(run_settings(tmp_path / "run", *sources, **after)))


def test_another_norm_epsilon_is_another_model(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    llama = make_llama(tmp_path / "llama")
    settings = run_settings(tmp_path / "run", llama, sources[1], training={"train_iters": 3})
    pool.run(1, TRAIN, settings)
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-6}))
    with pytest.raises(UserError, match=r"norm_epsilon 1e-05 .* the model to start from has 1e-06"):
        find_start(Config.model_validate(settings))
