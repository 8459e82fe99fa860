"""Steps for the harness of the first run, and the program that runs one: `toys.py --step NAME … --report-to FD`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.gpu.harness import SkipStep, Step, Trial, run_step

HERE = "tests.tools.toys"


def good(trial: Trial) -> None:
    trial.figure("rate", 123.456, headline=True)
    trial.figure("lost", float("nan"))
    trial.near("close", {"out": 1e-3}, 1e-2)


def wrong(trial: Trial) -> None:
    trial.near("far", {"out": 1e-3, "dq": float("nan")}, 1e-2)
    with trial.part("broken part"):
        raise RuntimeError("no such kernel")
    trial.figure("after it", 1)


def broken(trial: Trial) -> None:
    print("a line for the log")
    raise KeyError("absent")


def hanging(trial: Trial) -> None:
    """With a process of its own that would outlive it."""
    child = subprocess.Popen(["sleep", "600"])
    trial.figure("child", child.pid)
    time.sleep(600)


def dying(trial: Trial) -> None:
    trial.figure("before", 1)
    os.abort()


def lacking(trial: Trial) -> None:
    raise SkipStep("it needs the package nothing")


def step(name: str, seconds: float = 1.0) -> Step:
    return Step(name, seconds, "", f"{HERE}:{name}")


if __name__ == "__main__":
    name, descriptor = sys.argv[sys.argv.index("--step") + 1], int(sys.argv[-1])
    sys.exit(run_step(step(name), "--rehearse" in sys.argv, descriptor))
