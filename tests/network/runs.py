"""Runs of two ranks, one on each host, that stop in the middle of a step or a save until the test lets them go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.checkpoint.folder import step_folder
from tests.llama import run_settings
from tests.network.hosts import NAMES, Hosts
from tests.ranks import finish, start_ranks

STEPS = 6
PORT = "29511"


class Run:
    """One run: its configuration, its folder, and what its ranks have printed."""

    def __init__(self, folder: Path, sources: tuple[Path, Path], **sections: dict[str, Any]) -> None:
        self.folder, self.run, self.log = folder, folder / "run", folder / "log"
        self.config = folder / "run.yaml"
        sections.setdefault("checkpoint", {"save_interval": 2})
        settings = run_settings(
            self.run, *sources, training={"train_iters": STEPS}, logging={"tensorboard": True}, **sections
        )
        self.config.write_text(yaml.safe_dump(settings))

    def start(self, hosts: Hosts, pause: str = "") -> list[BaseProcess]:
        """Start rank 0 on host a, which has the store, and rank 1 on host b.

        Args:
            pause: "step 3" or "save 4": where rank 1 stops and waits for `go_on`.
        """

        def own(rank: int) -> dict[str, str]:
            name = NAMES[rank]
            launcher = {"MASTER_ADDR": NAMES[0], "MASTER_PORT": PORT, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            waits = {"TEST_PAUSE": pause, "TEST_FOLDER": str(self.folder)} if rank == 1 else {}
            return {**hosts.variables(name), **launcher, **waits}

        return start_ranks(["train", str(self.config)], len(NAMES), self.log, "tests.network.runs:enter_and_pause", own)

    def reaches_pause(self) -> None:
        """Wait until rank 1 has stopped."""
        until((self.folder / "reached").exists, self)

    def has_saved(self, step: int) -> None:
        """Wait until the checkpoint of a step is published."""
        until(step_folder(self.run, step).is_dir, self)

    def go_on(self) -> None:
        """Let rank 1 go on."""
        (self.folder / "go").touch()

    def told(self) -> str:
        """All that was printed, to ranks' own logs of a job as well."""
        files = [self.log, *sorted(self.run.glob("logs/*/*.log"))]
        return "".join(file.read_text() for file in files if file.exists())

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Loss and gradient norm by step, as TensorBoard has them in the end."""
        accumulator = EventAccumulator(str(self.run / "tensorboard"), size_guidance={"scalars": 0})
        accumulator.Reload()
        names = ("loss/train", "schedule/gradient_norm")
        return {name: [(point.step, point.value) for point in accumulator.Scalars(name)] for name in names}


def end(processes: Sequence[subprocess.Popen[bytes]], seconds: float = 240) -> list[int]:
    """Wait until commands that `Hosts.start` has started have ended, killing those that have not; their statuses."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    statuses = [process.poll() for process in processes]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [-1 if status is None else status for status in statuses]


def until(happened: Callable[[], bool], run: Run, seconds: float = 120) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, run.told()
        time.sleep(0.02)


def meet(hosts: Hosts, folder: Path, ranks: Sequence[str], master: str, **environment: str) -> list[dict[str, Any]]:
    """Let ranks join a world, add their ranks up and leave; what each says of it.

    Args:
        ranks: the host of each rank.
        master: MASTER_ADDR.
        environment: more variables for all ranks.
    """

    def own(rank: int) -> dict[str, str]:
        return {
            **hosts.variables(ranks[rank]),
            **environment,
            "MASTER_ADDR": master,
            "MASTER_PORT": PORT,
            "TEST_FOLDER": str(folder),
        }

    log = folder / "log"
    statuses = finish(start_ranks([], len(ranks), log, "tests.network.runs:enter_and_meet", own))
    assert statuses == [0] * len(ranks), log.read_text()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(len(ranks))]


def enter_and_meet() -> None:
    """In a rank: enter its host, join the world and write down what was chosen; ends the process."""
    import torch
    import torch.distributed as dist

    from megalong.runtime import distributed, network, peers
    from tests.network.hosts import enter_this

    enter_this()
    distributed.start(torch.device("cpu"), timeout_minutes=1.0)
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    found = {"sum": int(total), "said": peers.network_line(), "host": socket.gethostname()}
    found |= {name: os.environ.get(name) for name in (network.GLOO, network.NCCL)}
    (Path(os.environ["TEST_FOLDER"]) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    distributed.stop()
    sys.exit(0)


def enter_and_pause() -> None:
    """In a rank: enter its host, and be ready to stop where the test has asked for it."""
    from tests.network.hosts import enter_this

    enter_this()
    pause_where_asked()


def pause_where_asked() -> None:
    """In a rank: shorten what the watchdog grants to a start, and be ready to stop where TEST_PAUSE says."""
    from megalong.checkpoint.strategy import DeferredSave
    from megalong.runtime.watchdog import Watchdog
    from megalong.training import loop
    from megalong.training.step import TrainStep

    loop.Watchdog = partial(Watchdog, grace_seconds=6.0)  # type: ignore[misc,assignment]
    what, _, number = os.environ.get("TEST_PAUSE", "").partition(" ")
    if what == "step":
        # Its gradients are there, and not yet added up over both ranks.
        _pause(TrainStep, "_finalize", int(number))
    elif what == "save":
        _pause(DeferredSave, "write", int(number) // 2)


def _pause(owner: type, name: str, time_: int) -> None:
    original, folder, times = getattr(owner, name), Path(os.environ["TEST_FOLDER"]), 0

    def paused(*arguments: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        if times == time_:
            (folder / "reached").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return original(*arguments, **options)

    setattr(owner, name, paused)
