"""Whole processes of `megalong train`: signals through launchers, a rank that dies or hangs, restarts by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megalong.checkpoint.folder import find_checkpoint, read_meta
from megalong.training import events
from tests.llama import make_dataset, make_llama, run_settings
from tests.ranks import end_ranks, finish, start_ranks

ENDLESS = 5_000  # steps: minutes that no test waits for; the order of many more epochs would take seconds to draw

# What torchrun and `--nproc` start in the slow tests: one process in its first life is killed at its third step.
DIES_ONCE = """
import os, sys
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from tests.training.test_processes import die_at_step_3
    die_at_step_3()
from megalong.cli import main
sys.exit(main(sys.argv[1:]))
"""


def hang_at_step_1() -> None:
    """Rank 1 never ends its first step."""
    from functools import partial

    from megalong.runtime.watchdog import Watchdog
    from megalong.training import loop
    from megalong.training.step import TrainStep

    loop.Watchdog = partial(Watchdog, grace_seconds=3.0)  # type: ignore[misc,assignment]
    finalize = TrainStep._finalize

    def stuck(self: TrainStep, *arguments: object, **options: object) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(600)
        finalize(self, *arguments, **options)

    TrainStep._finalize = stuck  # type: ignore[method-assign]


def die_at_step_3() -> None:
    from megalong.training.step import TrainStep

    apply, times = TrainStep.apply, 0

    def killed(self: TrainStep, norm: float) -> None:
        nonlocal times
        times += 1
        if times == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        apply(self, norm)

    TrainStep.apply = killed  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    return make_llama(folder / "llama", num_hidden_layers=2), make_dataset(folder / "data")


def configuration(folder: Path, sources: tuple[Path, Path], iterations: int, **sections: dict[str, object]) -> Path:
    sections.setdefault("checkpoint", {"save_interval": 1, "keep_last": 3})
    file = folder / "run.yaml"
    training = {"train_iters": iterations}
    file.write_text(yaml.safe_dump(run_settings(folder / "run", *sources, training=training, **sections)))
    return file


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_that_dies_ends_those_that_wait_for_it(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """By themselves, without a launcher: their collectives fail."""
    ranks = start_ranks(["train", str(configuration(tmp_path, sources, ENDLESS))], 2, tmp_path / "log")
    try:
        wait_for((tmp_path / "run" / "checkpoints").is_dir)
        ranks[1].kill()
        assert finish(ranks, 60)[0] == 1
    finally:
        end_ranks(ranks)


def test_a_hang_ends_the_run_with_every_ranks_stack(sources: tuple[Path, Path], tmp_path: Path) -> None:
    file = configuration(tmp_path, sources, 3, runtime={"watchdog_minutes": 0.05})
    hang = "tests.training.test_processes:hang_at_step_1"
    assert finish(start_ranks(["train", str(file)], 2, tmp_path / "log", hang)) == [1, 1]
    stacks = [(tmp_path / "run" / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "in stuck" in stacks[1]
    assert all("in gradients" in stack for stack in stacks)
    assert "watchdog: rank 1 finished no step" in (tmp_path / "log").read_text()
    assert [event["kind"] for event in events.read(tmp_path / "run")] == ["start", "hang"]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGUSR1))],
    ids=["term", "int", "usr1"],
)
def test_a_signal_to_one_process_saves_and_ends_all(
    number: signal.Signals, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    file = configuration(tmp_path, sources, ENDLESS, checkpoint={"save_interval": 100_000})
    ranks = start_ranks(["train", str(file)], 2, log)
    wait_for(lambda: log.exists() and "step 2/" in log.read_text())
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, number)
    os.kill(ranks[1].pid, number)
    assert finish(ranks) == [0, 0], log.read_text()
    step = json.loads((run / "REQUEUE").read_text())["step"]
    assert read_meta(find_checkpoint(run)).step == step
    file.write_text(file.read_text().replace(f"train_iters: {ENDLESS}", f"train_iters: {step + 1}"))
    assert finish(start_ranks(["train", str(file), "data.allow_change=true"], 2, log)) == [0, 0], log.read_text()
    assert not (run / "REQUEUE").exists()
    assert [event["kind"] for event in events.read(run)] == ["start", "save", "signal", "resume", "save", "finish"]


@pytest.mark.slow
def test_nproc_passes_a_signal_on_and_waits_for_the_save(sources: tuple[Path, Path], tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    file = configuration(tmp_path, sources, ENDLESS, checkpoint={"save_interval": 100_000})
    with log.open("w") as stream:
        started = subprocess.Popen([*MEGALONG, str(file), "--nproc", "2"], env=environment(), stderr=stream)
        wait_for(lambda: "step 2/" in log.read_text())
        started.send_signal(signal.SIGTERM)
        started.send_signal(signal.SIGUSR1)
        assert started.wait(120) == 0, log.read_text()
    assert read_meta(find_checkpoint(run)).step == json.loads((run / "REQUEUE").read_text())["step"]


@pytest.mark.slow
def test_torchrun_starts_a_run_again_when_a_rank_has_died(sources: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    file = configuration(tmp_path, sources, 5)
    ended = subprocess.run(
        [*TORCHRUN, "--max-restarts=1", str(script), "train", str(file)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    kinds = [(event["kind"], event["step"]) for event in events.read(tmp_path / "run") if event["kind"] != "save"]
    # Whether the save of step 2 was done when the process died is the disk's to say.
    assert kinds in ([("start", 0), ("resume", step), ("finish", 5)] for step in (1, 2)), ended.stderr


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(sources: tuple[Path, Path], tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    file = configuration(tmp_path, sources, ENDLESS, checkpoint={"save_interval": 100_000})
    with log.open("w") as stream:
        started = subprocess.Popen([*TORCHRUN, "-m", *MEGALONG[2:], str(file)], env=environment(), stderr=stream)
        wait_for(lambda: "step 2/" in log.read_text())
        started.send_signal(signal.SIGTERM)
        started.wait(120)  # its own exit status is 1 for any signal
    assert read_meta(find_checkpoint(run)).step == json.loads((run / "REQUEUE").read_text())["step"], log.read_text()


MEGALONG = [sys.executable, "-m", "megalong", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def environment() -> dict[str, str]:
    # A script elsewhere imports this module from here.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
