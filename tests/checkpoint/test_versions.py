"""Checkpoints of one Megatron-Core line under another: older ones load, newer ones are refused in one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import read_meta, step_folder
from megalong.errors import UserError
from megalong.runtime import megatron
from tests.llama import SHAPE, make_dataset, make_llama, run_settings
from tests.pool import WorkerPool

# tests/compat.sh names the interpreter of the older line here.
OLDER = os.environ.get("MEGALONG_OLDER_PYTHON", "")
TRAIN = """
import json, sys
from tests.training.workers import train_run
print(json.dumps(train_run(json.loads(sys.argv[1]))))
"""
ARCHITECTURE = {
    "hidden_size": SHAPE["hidden_size"],
    "ffn_hidden_size": SHAPE["intermediate_size"],
    "num_layers": SHAPE["num_hidden_layers"],
    "num_attention_heads": SHAPE["num_attention_heads"],
    "num_query_groups": SHAPE["num_key_value_heads"],
    "kv_channels": SHAPE["head_dim"],
    "vocab_size": SHAPE["vocab_size"],
    "norm_epsilon": SHAPE["rms_norm_eps"],
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "rope": {"rope_theta": 10000.0},
}


def written_by(version: str, folder: Path) -> Path:
    meta = {"format": 1, "step": 5, "architecture": ARCHITECTURE, "versions": {"megatron-core": version}}
    (folder / "megalong.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(("theirs", "ours"), [("0.19.2", "0.16.1"), ("0.20.0rc1+abc123", "0.18.2")])
def test_a_newer_format_is_refused_in_one_line(
    theirs: str, ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "version", lambda: ours)
    with pytest.raises(UserError) as error:
        read_meta(written_by(theirs, tmp_path))
    message = str(error.value)
    assert theirs in message
    assert ours in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("theirs", "ours"), [("0.16.1", "0.19.2"), ("0.16.1", "0.16.1"), ("0.18.0", "0.16.1"), ("0.19.2", "0.19.0")]
)
def test_the_same_or_an_older_format_is_not(
    theirs: str, ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "version", lambda: ours)
    assert read_meta(written_by(theirs, tmp_path)).step == 5


def test_the_version_is_the_installed_one() -> None:
    assert megatron.version() == importlib.metadata.version("megatron-core")


@pytest.mark.skipif(not OLDER, reason="needs a second environment with an older Megatron-Core (tests/compat.sh)")
def test_a_run_of_the_older_line_goes_on_here(tmp_path: Path, pool: WorkerPool) -> None:
    """Five steps there, five here: the losses and norms are those of ten steps there."""
    settings = run_settings(
        tmp_path / "run",
        make_llama(tmp_path / "hf"),
        make_dataset(tmp_path / "data"),
        checkpoint={"save_interval": 5},
    )
    there = _train_there(settings)
    last = step_folder(tmp_path / "run", 10)
    last.rename(tmp_path / "last")
    (here,) = pool.run(1, "tests.training.workers:train_run", settings)
    assert here["started"] == 5
    for ours, theirs in zip(here["records"], there["records"][5:], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-6)


def _train_there(settings: dict[str, Any]) -> dict[str, Any]:
    answer = subprocess.run(
        [OLDER, "-c", TRAIN, json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout.splitlines()[-1]))
