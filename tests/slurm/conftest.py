"""A real cluster for the whole module, and runs small enough for two nodes on a laptop's cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import ROOT


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    cluster = Cluster()
    try:
        cluster.__enter__()
    except (OSError, RuntimeError) as error:
        pytest.skip(f"SLURM is installed but does not start here: {str(error).splitlines()[0]}")
    with cluster:
        yield cluster


@pytest.fixture(scope="package")
def environment() -> dict[str, str]:
    """What the project's scripts are told about this machine: CPUs, and which Python."""
    return {
        "GPUS_PER_NODE": "0",
        "PROCESSES_PER_NODE": "1",
        "MEGALONG_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": os.environ["PATH"],
    }


@pytest.fixture(scope="package")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space and a quote in its name, that holds a dataset."""
    from tests.llama import make_dataset

    folder = tmp_path_factory.mktemp("slurm") / "it's a folder"
    folder.mkdir()
    make_dataset(folder / "data", documents=400)
    return folder


def write_run(sources: Path, name: str, steps: int = 10, **sections: dict[str, Any]) -> Path:
    """The configuration of a run of `steps` steps, in `sources`."""
    shape = {"hidden_size": 128, "ffn_hidden_size": 256, "num_layers": 4, "num_attention_heads": 8}
    shape |= {"num_query_groups": 4, "vocab_size": 515, "max_position_embeddings": 256}
    tree: dict[str, Any] = {
        "run": {"name": name, "dir": str(sources / name)},
        "model": {"architecture": {**shape, "rope": {"rope_theta": 10000.0}}},
        "data": {"seq_length": 256, "mixture": [{"name": "a", "path": str(sources / "data"), "weight": 1.0}]},
        "precision": {"params_dtype": "fp32"},
        "optimizer": {"lr": 1e-3, "warmup_iters": 2},
        "training": {"train_iters": steps, "global_batch_size": 4},
        "checkpoint": {"save_interval": 1000},
        "runtime": {"device": "cpu", "timeout_minutes": 2.0},
        "slurm": {"gpus_per_node": 0, "cpus_per_node": 2},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    file = sources / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file
