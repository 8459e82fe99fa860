"""Local processes end together: the first to fail ends the others, and none outlives the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PARENT = """
import os, sys
from megalong.runtime.launch import run_local
os.environ["PYTHONPATH"] = os.getcwd()
sys.exit(run_local([], 2))
"""
# Stands in for the real package in the processes that are started: rank 1 does what the test asks for.
CHILD = """
import os, pathlib, time
rank = os.environ["RANK"]
here = pathlib.Path(rank)
here.with_suffix(".new").write_text(str(os.getpid()))
here.with_suffix(".new").rename(here)
end = pathlib.Path("end")
while not (rank == "1" and end.exists()):
    time.sleep(0.02)
os._exit(int(end.read_text()))
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    package = tmp_path / "megalong"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(CHILD)
    started = subprocess.Popen([sys.executable, "-P", "-c", PARENT], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    yield started
    for process in (started.pid, *children(tmp_path)):
        if alive(process):
            os.kill(process, signal.SIGKILL)
    started.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and whose parent has not asked is a zombie, which does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(folder: Path) -> list[int]:
    return [int((folder / rank).read_text()) for rank in "01"]


def test_none_outlives_a_killed_parent(parent: subprocess.Popen[bytes], tmp_path: Path) -> None:
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(process) for process in children(tmp_path)))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_a_killed_process_takes_the_others_down(
    sent: signal.Signals, status: int, parent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    os.kill(children(tmp_path)[0], sent)
    assert parent.wait(20) == status
    assert not any(alive(process) for process in children(tmp_path))


def test_a_users_mistake_in_one_process_is_the_status_of_all(parent: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / "2").write_text("2")
    (tmp_path / "2").rename(tmp_path / "end")
    assert parent.wait(20) == 2
    assert not any(alive(process) for process in children(tmp_path))


def test_children_run_the_code_of_their_parent(tmp_path: Path) -> None:
    """And not what lies in the folder they are started in, where `python -m` looks first."""
    (tmp_path / "megalong").mkdir()
    (tmp_path / "megalong" / "__init__.py").write_text("raise SystemExit(7)")
    code = "import sys; from megalong.runtime.launch import run_local; sys.exit(run_local(['--version'], 1))"
    root = str(Path(__file__).parents[2])
    started = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert started.returncode == 0


LATE = """
import os, sys, time
from megalong.commands.parsing import print_error
time.sleep(2.0 if os.environ["RANK"] == "0" else 0.0)
print_error("every rank has met this")
sys.exit(2)
"""


def test_under_torchrun_the_rank_that_speaks_is_waited_for(tmp_path: Path) -> None:
    """torchrun ends all ranks with the first that ends: here rank 1, two seconds before rank 0 has come so far."""
    (tmp_path / "late.py").write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "late.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.count("megalong: error: every rank has met this\n") == 1
