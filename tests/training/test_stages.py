"""Stages of one configuration: each starts from the weights of the one before, in one job or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megalong.checkpoint.folder import find_checkpoint, read_meta
from megalong.errors import UserError
from megalong.training import launch
from tests.llama import make_dataset, make_llama, run_settings
from tests.ranks import megalong


def train(config: Path, *overrides: str) -> str:
    done = megalong("train", config, *overrides)
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
        {"name": "short", "attention": {"window_size": 9, "window_attn_skip_freq": 2}},
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
    assert first.architecture.layer_windows == second.architecture.layer_windows == (9, None, 9, None)

    # A second job, with more to do: the first stage resumes for its last step, the second for its own.
    again = train(config, "training.train_iters=3")
    assert again.count("of step 2") == 2
    assert "weights from" not in again
    assert "is complete at step 3" in train(config, "training.train_iters=3")


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({"model": {"load": {"hf": "nowhere"}}}, "nowhere/config.json: no such file"),
        ({"parallel": {"pipeline_model_parallel_size": 3}}, "does not divide the model's 4 layers"),
        ({"attention": {"window_size": 9, "window_attn_skip_freq": [1, 0]}}, "2 entries and the model 4 layers"),
    ],
)
def test_the_last_stages_mistake_is_told_before_the_first_starts(
    last: dict[str, Any], told: str, tmp_path: Path
) -> None:
    settings = run_settings(tmp_path / "run", make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data"))
    settings["training"] |= {"global_batch_size": 3, "micro_batch_size": 1}
    settings["stages"] = [{"name": "short"}, {"name": "long", **last}]
    config = tmp_path / "stages.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=told):
        launch.train(str(config), nproc=3)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_below_a_file_is_told_before_a_process_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    settings = run_settings(tmp_path / "file" / "run", make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"run\.dir .*file/run: .*file is a file"):
        launch.train(str(config), nproc=2)
