"""SIGKILL to any rank at any moment, while it saves too: the same command goes on and ends with the same bits."""

from __future__ import annotations

import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megalong.checkpoint.folder import find_checkpoint, read_meta
from tests.llama import make_dataset, make_llama, run_settings
from tests.ranks import end_ranks, finish, start_ranks

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    hf, data = make_llama(folder / "llama", num_hidden_layers=2), make_dataset(folder / "data")
    for name in ("unbroken", "killed"):
        settings = run_settings(
            folder / name,
            hf,
            data,
            # A save at every step: half of a run's time and more is spent in saves.
            checkpoint={"save_interval": 1, "keep_last": 2},
            training={"train_iters": STEPS},
            run={"seed": 5},
        )
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The weights and optimizer's state a run ends with, and how long it takes from its first save on."""
    ranks = start(folder, "unbroken")
    wait_for_the_first_save(folder / "unbroken")
    began = time.monotonic()
    assert finish(ranks) == [0, 0], (folder / "unbroken.log").read_text()
    return tensors(folder / "unbroken"), time.monotonic() - began


def start(folder: Path, name: str) -> list[BaseProcess]:
    return start_ranks(["train", str(folder / f"{name}.yaml")], 2, folder / f"{name}.log")


def wait_for_the_first_save(run: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "checkpoints").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, read without Megatron-Core."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    checkpoint = find_checkpoint(run)
    assert read_meta(checkpoint).step == STEPS
    state: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found = {name: value for name, value in flat(state).items() if isinstance(value, torch.Tensor)}
    assert any("weight" in name for name in found)
    assert any("exp_avg" in name for name in found)
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key, part in tree.items() for name, value in flat(part, f"{prefix}.{key}").items()}


def trial(folder: Path, unbroken: tuple[dict[str, torch.Tensor], float], seed: int) -> None:
    wanted, seconds = unbroken
    numbers = random.Random(seed)
    shutil.rmtree(folder / "killed", ignore_errors=True)
    (folder / "killed.log").unlink(missing_ok=True)
    ranks = start(folder, "killed")
    if seed % 5:  # one in five at any moment, while it starts too
        wait_for_the_first_save(folder / "killed")
    time.sleep(numbers.uniform(0, seconds))
    ranks[numbers.randrange(2)].kill()
    end_ranks(ranks)
    told = f"seed {seed}\n"
    assert finish(start(folder, "killed")) == [0, 0], told + (folder / "killed.log").read_text()
    found = tensors(folder / "killed")
    assert found.keys() == wanted.keys(), told
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == [], told


@pytest.mark.parametrize("seed", [0])
def test_a_killed_run_ends_as_the_unbroken_one(
    seed: int, folder: Path, unbroken: tuple[dict[str, torch.Tensor], float]
) -> None:
    trial(folder, unbroken, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 30))
def test_killed_at_29_more_moments(seed: int, folder: Path, unbroken: tuple[dict[str, torch.Tensor], float]) -> None:
    trial(folder, unbroken, seed)
