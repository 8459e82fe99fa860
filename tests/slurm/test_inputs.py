"""Weights and data that are not there: named by `megalong slurm` as far as it can see, before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalong import cli
from megalong.config.load import load_config
from megalong.slurm.inputs import missing_inputs, seen_from_here
from tests.slurm.test_command import CONFIG, SFT

PLAIN = CONFIG.replace(', container: "/a b.sqsh"', "").replace("NAME", "small").replace("DIR", "runs/one")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of which everything is there, and a false sbatch that notes that it was called."""
    monkeypatch.chdir(tmp_path)
    files = ["h/config.json", "h/model.safetensors", "data/a.bin", "data/a.idx", "chats.jsonl"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run.yaml").write_text(PLAIN.replace("LOAD", "{hf: h}"))
    (tmp_path / "sft.yaml").write_text(SFT.replace("DIR", "runs/two").replace("LOAD", "{checkpoint: runs/one}"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\ncat >>{tmp_path}/submitted\necho 7\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path


def missing(*overrides: str, **load: str) -> list[str]:
    """What a run, started from `load`, is said to miss."""
    config = load_config("run.yaml", [*overrides, *([f"model.load={json.dumps(load)}"] if load else [])])[0]
    return missing_inputs(config, seen=seen_from_here(config))


def test_nothing_is_said_where_all_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slurm", "run.yaml", "--nodes", "2", "--chain", "sft.yaml", "--submit"]) == 0
    assert capsys.readouterr().err == ""
    assert (folder / "submitted").read_text().count("#!/usr/bin/env bash") == 3


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("h/config.json", "model.load.hf h: config.json: no such file or directory"),
        ("h/model.safetensors", "model.load.hf h: has no model.safetensors, nor shards of one"),
        ("data/a.bin", "data.mixture a data/a: a.bin: no such file or directory"),
        ("data/a.idx", "data.mixture a data/a: a.idx: no such file or directory"),
        ("chats.jsonl", "sft.sources chats chats.jsonl: chats.jsonl does not exist or is not a file; check the path"),
    ],
)
def test_what_is_gone_is_named_and_nothing_submitted(
    folder: Path, capsys: pytest.CaptureFixture[str], gone: str, line: str
) -> None:
    """A script that is printed only comes with a warning: the files may yet come."""
    (folder / gone).unlink()
    words = ["slurm", "run.yaml", "--nodes", "2", "--chain", "sft.yaml"]
    assert cli.main([*words, "--submit"]) == 2
    told = capsys.readouterr()
    assert told.err == (
        f"megalong: error: --submit: {line}. The job runs in {folder}: put it there, or write the right path\n"
    )
    assert not (folder / "submitted").exists()
    assert cli.main(words) == 0
    told = capsys.readouterr()
    warning = f"megalong: warning: {line}; the job fails at its start if it is still missing then"
    assert told.err.splitlines() == [warning]
    assert told.out.startswith("#!")


def test_a_job_that_waits_for_another_may_be_submitted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data" / "a.idx").unlink()
    waits = "slurm.options=['--dependency=afterok:5']"
    assert cli.main(["slurm", "run.yaml", waits, "--nodes", "2", "--submit"]) == 0
    assert "warning: data.mixture a data/a: a.idx" in capsys.readouterr().err
    assert (folder / "submitted").exists()


def test_what_earlier_stages_make_is_not_missed(folder: Path) -> None:
    first, second = (load_config(name)[0] for name in ("run.yaml", "sft.yaml"))
    assert missing_inputs(second, made=[first.run.dir]) == []
    assert missing_inputs(second) == ["model.load.checkpoint runs/one: no such file or directory"]
    step = folder / "runs" / "one" / "checkpoints" / "step-00000007"
    step.with_suffix(".tmp").mkdir(parents=True)
    (step.with_suffix(".tmp") / "megalong.json").touch()
    assert missing_inputs(second) == ["model.load.checkpoint runs/one: has no checkpoint"]
    step.with_suffix(".tmp").rename(step)
    assert missing_inputs(second) == []
    assert missing(checkpoint="runs/one/checkpoints/step-00000007") == []


def test_a_run_that_resumes_needs_no_first_weights(folder: Path) -> None:
    assert missing(hf="gone") == ["model.load.hf gone: no such file or directory"]
    step = folder / "runs" / "one" / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (step / "megalong.json").touch()
    assert missing(hf="gone") == []


def test_shards_are_looked_up_by_their_index(folder: Path) -> None:
    (folder / "h" / "model.safetensors").unlink()
    shards = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (folder / "h" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "h" / "1.safetensors").touch()
    assert missing() == ["model.load.hf h: 1 of its shards are missing, the first is 2.safetensors"]
    (folder / "h" / "2.safetensors").touch()
    assert missing() == []


def test_what_this_machine_cannot_see_is_passed_over(folder: Path) -> None:
    """A file system that is not mounted here; a container's own files; those it shows are looked up where they are."""
    assert missing(hf="/not-mounted-here/h") == []
    assert missing(hf=f"{folder}/gone") == [f"model.load.hf {folder}/gone: no such file or directory"]
    inside = "slurm.container=image.sqsh"
    assert missing(inside, hf=f"{folder}/gone") == []
    mounts = [inside, f"slurm.container_mounts={folder}/h:/models/h:ro,/other"]
    assert missing(*mounts, hf="/models/h") == missing(*mounts, hf="/models/hh") == missing(*mounts, hf="gone") == []
    assert missing(*mounts, hf="/models/h/gone") == ["model.load.hf /models/h/gone: no such file or directory"]
    mounts = [inside, f"slurm.container_mounts={folder}"]
    assert missing(*mounts, hf="gone") == ["model.load.hf gone: no such file or directory"]
