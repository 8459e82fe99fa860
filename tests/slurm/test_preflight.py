"""`megalong preflight` in processes that stand for two nodes: fit ones pass, a bad one is named before training."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import write_run
from tests.slurm.jobs import ROOT

# Says first what is wrong with the node of the second process.
BAD = """
import os, sys
from megalong import cli
from megalong.runtime import node_report
if os.environ["SLURM_PROCID"] == "1":
    node_report.{name} = {value}
sys.exit(cli.main(sys.argv[1:]))
"""


def start(config: Path, *words: str, code: str | None = None, ranks: tuple[int, ...] = (0, 1)) -> list[tuple[int, str]]:
    """Exit status and output of each rank, one on each of two nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    common = {"MEGALONG_NODES": "n0 n1 ", "MASTER_PORT": str(port), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "GPUS_PER_NODE": "0"}
    program = ["-c", code] if code else ["-m", "megalong"]
    processes = [
        subprocess.Popen(
            [sys.executable, *program, "preflight", str(config), *words],
            env={**kept, **common, "SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"n{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    return [(process.returncode, output) for process in processes for output in [process.communicate(timeout=120)[0]]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path, "run")


def test_fit_nodes_pass_and_their_speed_is_told(config: Path) -> None:
    first, second = start(config)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert "preflight: to the next node" in first[1]
    assert "preflight: 2 nodes, 2 processes: fit for run" in first[1]
    assert second[1] == ""
    assert not list(config.parent.joinpath("run").glob(".preflight*"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        pytest.param("versions", "lambda: {'torch': '1.0'}", "node n1: ", marks=pytest.mark.slow),
        pytest.param(
            "probe",
            "lambda device: (0.1, False)",
            "node n1: cpu computes a wrong matrix product",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "_shared",
            "lambda token: ['does not see the run folder']",
            "node n1: does not see the run folder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_bad_node_is_named_in_one_line(config: Path, name: str, value: str, told: str) -> None:
    first, second = start(config, code=BAD.format(name=name, value=value))
    assert (first[0], second[0]) == (2, 2)
    assert f"megalong: error: preflight: {told}" in first[1]
    assert second[1] == ""


@pytest.mark.slow
def test_a_slow_network_is_refused(config: Path) -> None:
    first, _ = start(config, "slurm.min_gb_per_s=1000000")
    assert first[0] == 2
    assert re.search(r"preflight: node n1: \S+ GB/s to its neighbours, below", first[1])


@pytest.mark.slow
def test_a_mistake_in_the_configuration_is_told_once(config: Path) -> None:
    first, second = start(config, "training.global_batch_size=3")
    assert (first[0], second[0]) == (2, 2)
    assert "global_batch_size 3 is not a multiple" in first[1]
    assert second[1] == ""


def test_a_silent_node_is_named(config: Path) -> None:
    code = (
        "import sys\nfrom megalong.training.preflight import preflight\n"
        "sys.exit(preflight(sys.argv[2], report_seconds=5))"
    )
    ((status, output),) = start(config, code=code, ranks=(0,))
    assert status == 2
    assert "preflight: node n1: no answer from rank 1 within 5 s" in output
