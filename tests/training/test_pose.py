"""Training at skipped positions and on packs side by side is transformers' with those positions and that mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalong.batches.open_samples import open_samples
from megalong.config.schema import Config
from megalong.data.inspect_samples import positions_of, targets_of
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation
from tests.training.gradients import plain_llama

POSE = {"pose": {"target_length": 1024, "chunks": 3}}
CASES: dict[str, dict[str, Any]] = {
    "pose": POSE,
    "pose masked": POSE | {"packing": "masked"},
    "packs": {"packs": 16},
    "packs best fit": {"packs": 16, "packing": "best_fit"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_transformers(case: str, tmp_path: Path, pool: WorkerPool) -> None:
    changes = dict(CASES[case])
    llama, data = make_llama(tmp_path / "hf", max_position_embeddings=1024), make_dataset(tmp_path / "data")
    settings = run_settings(tmp_path / "run", llama, data)
    if (length := changes.pop("packs", None)) is not None:
        only = settings["data"]["mixture"][0]
        settings["data"]["mixture"] = [only, {**only, "name": "short", "seq_length": length}]
    settings["data"] |= changes
    plain = plain_step(llama, settings)
    for ranks, parallel in ((1, {}), (2, {"context_parallel_size": 2})):
        ours = pool.run(ranks, "tests.training.test_pose:steps", settings | {"parallel": parallel}, 1)
        assert deviation(ours, plain) <= TOLERANCE["fp32"], ranks


def steps(settings: dict[str, Any], count: int) -> dict[str, list[float]]:
    """In a worker: the first steps on the samples that a run opens."""
    from tests.training.workers import _session

    with _session(settings) as session:
        from megalong.batches.loader import Batches
        from megalong.training.step import TrainStep

        config = session.config
        batches = Batches(config, lambda: open_samples(config, "train", None, None), session.device)
        step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        results = [step.run(batches, index * config.training.global_batch_size) for index in range(count)]
        return {"loss": [r.loss for r in results], "norm": [r.gradient_norm for r in results]}


def plain_step(llama: Path, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Loss and gradient norm of the first global batch, by `position_ids` and a mask of our own making."""
    config = Config.model_validate(settings)
    samples, model, losses = open_samples(config, "train", None, None), plain_llama(llama), []
    masked = config.data.masked
    for k in range(config.training.global_batch_size):
        sample = samples.read(k)
        tokens = torch.from_numpy(sample.tokens[:])[None]
        places = torch.arange(tokens.shape[1] - 1)
        starts = torch.from_numpy(sample.documents if masked else sample.documents[:1])
        document = torch.searchsorted(starts, places, right=True)
        seen = (places[:, None] >= places[None]) & (document[:, None] == document[None])
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        positions = torch.from_numpy(positions_of(sample, masked))[None]
        logits = model(input_ids=tokens[:, :-1], position_ids=positions, attention_mask=bias, use_cache=False).logits
        learnt = torch.from_numpy(targets_of(sample, masked))[1:]
        losses.append(torch.nn.functional.cross_entropy(logits[0].float(), tokens[0, 1:], reduction="none")[learnt])
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return {"loss": [loss.item()], "norm": [norm.item()]}


def test_loss_by_position_reaches_the_target(tmp_path: Path, pool: WorkerPool) -> None:
    """Buckets of 64 128 256 512 1024 positions in training; held-out samples have plain ones, below 64."""
    settings = run_settings(
        tmp_path / "run",
        make_llama(tmp_path / "hf", max_position_embeddings=1024),
        make_dataset(tmp_path / "data"),
        evaluation={"interval": 1},
    )
    settings["data"] |= POSE
    (told,) = pool.run(1, "tests.training.workers:train_run", settings, 3)
    trained, held_out = (
        np.array([list(record[name].values()) for record in told["records"]], float)
        for name in ("position_losses", "validation_position_losses")
    )
    assert trained.shape == (3, 5)
    assert held_out.shape == (3, 1)
    assert np.isfinite(trained[:, [0, -1]]).all()
    assert np.isfinite(held_out).all()
