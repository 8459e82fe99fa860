"""A resume meets the data it was trained on, or is told what changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import META, SEAL, find_checkpoint, read_meta
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.training.start import find_start
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> dict[str, Any]:
    """Settings of a run of two domains that was stopped after two of its ten steps."""
    folder = tmp_path_factory.mktemp("changed")
    settings = run_settings(
        folder / "run", make_llama(folder / "llama"), make_dataset(folder / "a"), checkpoint={"save_interval": 1}
    )
    settings["data"]["mixture"] = [
        {"name": "a", "path": str(folder / "a"), "weight": 1.0},
        {"name": "b", "path": str(make_dataset(folder / "b", seed=1)), "weight": 3.0},
    ]
    pool.run(1, "tests.training.workers:train_run", settings, 2)
    return settings


def changed(settings: dict[str, Any], **data: Any) -> Config:
    return Config.model_validate(settings | {"data": settings["data"] | data})


def mixture(settings: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    first, second = settings["data"]["mixture"]
    return [first | values, second]


def test_what_decides_the_order_is_saved_and_refused_when_it_changes(trained: dict[str, Any]) -> None:
    assert find_start(changed(trained)).changed_data == ()
    for data, told in (
        ({"seq_length": 32}, "data.seq_length 64 → 32;"),
        ({"packing": "masked"}, "data.packing default → masked;"),
        ({"split": "99,1"}, "data.split 90,10 → default;"),
        ({"mixture": mixture(trained, weight=2.0)}, "data.mixture.a.weight 1.0 → 2.0;"),
        ({"mixture": mixture(trained, lengths={"drop_below": 9})}, "data.mixture.a.lengths.drop_below default → 9;"),
        ({"mixture": mixture(trained)[::-1]}, "data.mixture [a, b] → [b, a];"),
        ({"mixture": mixture(trained)[:1]}, "data.mixture [a, b] → [a];"),
    ):
        with pytest.raises(UserError) as refused:
            find_start(changed(trained, **data))
        assert f"was trained on other data up to step 2: {told} sample 8 would not be" in str(refused.value)
        assert find_start(changed(trained, **data, allow_change=True)).changed_data == (told.removesuffix(";"),)
    with pytest.raises(UserError, match=r"run\.seed 1234 → 5;"):
        find_start(Config.model_validate(trained | {"run": trained["run"] | {"seed": 5}}))


def test_batches_and_steps_are_no_data(trained: dict[str, Any]) -> None:
    training = {"train_iters": 20, "global_batch_size": 8, "micro_batch_size": 2}
    assert find_start(Config.model_validate(trained | {"training": training})).changed_data == ()


def test_a_dataset_written_anew_is_another(trained: dict[str, Any], tmp_path: Path) -> None:
    tokens = Path(trained["data"]["mixture"][1]["path"] + ".bin")
    status = tokens.stat()
    os.utime(tokens, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        with pytest.raises(UserError, match=r"data\.mixture\.b: its files changed \(size, modification time or"):
            find_start(changed(trained))
    finally:
        os.utime(tokens, ns=(status.st_atime_ns, status.st_mtime_ns))
    moved = [tmp_path / f"moved{kind}" for kind in (".bin", ".idx")]
    for path in moved:
        path.hardlink_to(tokens.with_suffix(path.suffix))
    here, there = trained["data"]["mixture"]
    assert find_start(changed(trained, mixture=[here, there | {"path": str(tmp_path / "moved")}])).changed_data == ()


def test_a_checkpoint_of_an_earlier_version_resumes(trained: dict[str, Any]) -> None:
    file = find_checkpoint(trained["run"]["dir"]) / META
    before = file.read_text()
    told = json.loads(before)
    assert told.pop("data")["data.seq_length"] == 64
    told["checksums"] = {}
    file.write_text(json.dumps(told))
    seal = file.with_name(SEAL).rename(file.with_name("seal"))
    try:
        assert find_start(changed(trained, seq_length=32)).resume is not None
    finally:
        seal.rename(file.with_name(SEAL))
        file.write_text(before)


def test_an_allowed_change_is_logged_and_saved(trained: dict[str, Any], pool: WorkerPool) -> None:
    settings = trained | {"run": trained["run"] | {"seed": 7}, "data": trained["data"] | {"allow_change": True}}
    pool.run(1, "tests.training.workers:start_run", settings)
    logged = (Path(trained["run"]["dir"]) / "log.txt").read_text()
    assert "data.allow_change: the data has changed from sample 8 on: run.seed 1234 → 7" in logged
    assert pool.run(1, "tests.training.workers:train_run", settings, 3)[0]["started"] == 2
    assert read_meta(find_checkpoint(trained["run"]["dir"])).data["run.seed"] == 7
