"""Two hosts for the whole folder, and runs of two ranks small enough to be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama import make_dataset, make_llama
from tests.network.hosts import Hosts, missing
from tests.network.runs import STEPS, Run
from tests.ranks import finish, start_ranks


@pytest.fixture(scope="package")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with Hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="package")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("network")
    return make_llama(folder / "llama", num_hidden_layers=2), make_dataset(folder / "data")


@pytest.fixture(scope="package")
def unbroken(hosts: Hosts, sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks on one host that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("unbroken"), sources)
    assert finish(start_ranks(["train", str(run.config)], 2, run.log)) == [0, 0], run.told()
    assert [step for step, _ in run.curves()["loss/train"]] == list(range(1, STEPS + 1))
    return run
