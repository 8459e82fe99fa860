"""Stages of one configuration: each starts from the weights of the one before, in one job or several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from megalong.checkpoint.folder import find_checkpoint, read_meta
from tests.llama import make_dataset, make_llama, run_settings


def train(config: Path, *overrides: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megalong", "train", str(config), *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_stages_run_one_after_another_and_go_on_in_a_later_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = run_settings(
        run,
        make_llama(tmp_path / "hf"),
        make_dataset(tmp_path / "data"),
        training={"train_iters": 2, "global_batch_size": 2},
        optimizer={"warmup_iters": 1},
    )
    rope = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    settings["stages"] = [
        {"name": "short"},
        {"name": "long", "data": {"seq_length": 128}, "model": {"rope": rope}},
    ]
    config = tmp_path / "stages.yaml"
    config.write_text(yaml.safe_dump(settings))
    log = train(config)
    assert "weights from " + str(tmp_path / "hf") in log
    assert f"weights from {run / '01-short'}" in log
    assert "step, optimizer, schedule and data position start fresh" in log
    first, second = (read_meta(find_checkpoint(run / name)) for name in ("01-short", "02-long"))
    assert (first.step, second.step, second.consumed_samples) == (2, 2, 4)
    assert (first.architecture.rope.type, second.architecture.rope.type) == ("none", "yarn")
    assert second.architecture.max_position_embeddings == 128

    # A second job, with more to do: the first stage resumes for its last step, the second for its own.
    again = train(config, "training.train_iters=3")
    assert again.count("of step 2") == 2
    assert "weights from" not in again
    assert "is complete at step 3" in train(config, "training.train_iters=3")
