"""A hang ends the process and leaves its stacks, even where it holds Python's lock; a beat in time does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalong.runtime.watchdog import Watchdog

HANG = """
import ctypes, sys, time
from pathlib import Path
from megalong.runtime.watchdog import Watchdog

def stuck():
    {how}

with Watchdog(Path(sys.argv[1]), 3, 0.3 / 60, lambda: print("told", flush=True), grace_seconds=0.3):
    stuck()
"""


@pytest.mark.parametrize(
    ("how", "told"), [("time.sleep(60)", True), ("ctypes.PyDLL(None).sleep(60)", False)], ids=["waiting", "locked"]
)
def test_a_hang_leaves_its_stacks_and_ends(how: str, told: bool, tmp_path: Path) -> None:
    script = HANG.format(how=how)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1
    assert "in stuck" in (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert ("told" in ended.stdout) is told
    assert ("watchdog: rank 3 finished no step" in ended.stderr) is told


def test_beats_keep_it_quiet_and_nothing_is_left(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 60.0, lambda: None) as watchdog:
        watchdog.beat()
        assert (tmp_path / "stacks" / "rank-0.txt").exists()
    assert not list(tmp_path.iterdir())


def test_zero_minutes_never_wake(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.0, lambda: None) as watchdog:
        watchdog.beat()
        time.sleep(0.05)
        assert not list(tmp_path.iterdir())
