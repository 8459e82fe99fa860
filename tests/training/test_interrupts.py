"""Ctrl-C: training saves as after SIGTERM; whatever else runs ends by it, in one line, with nothing half written."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from megalong import cli
from megalong.config.lora import Lora
from megalong.hf import adapter, writer
from megalong.runtime import signals
from megalong.training.interrupt import Interrupt
from tests.llama import make_dataset, make_llama
from tests.ranks import end_ranks, start_ranks
from tests.training.test_processes import configuration, wait_for


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("interrupts")
    return make_llama(folder / "llama", num_hidden_layers=2), make_dataset(folder / "data")


def interrupt(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    return None


def test_a_blocked_rank_says_at_once_what_it_does_and_ends_at_the_second(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """Rank 1 never ends its step: rank 0 waits for it in a collective, in which no handler of Python's runs."""
    log = tmp_path / "log"
    file = configuration(tmp_path, sources, 3)
    ranks = start_ranks(["train", str(file)], 2, log, "tests.training.test_processes:hang_at_step_1")
    try:
        wait_for(lambda: (tmp_path / "run" / "stacks" / "rank-1.txt").exists())
        time.sleep(1)
        assert ranks[0].pid is not None
        os.kill(ranks[0].pid, signal.SIGINT)
        wait_for(lambda: "signal SIGINT: step 1 is in micro-batch 1 of 1" in log.read_text())
        os.kill(ranks[0].pid, signal.SIGINT)  # the same press, passed on by a launcher
        time.sleep(signals.SAME_PRESS_UNDER_LAUNCHER + 0.2)
        assert ranks[0].is_alive()
        os.kill(ranks[0].pid, signal.SIGINT)
        ranks[0].join(20)
        assert ranks[0].exitcode == 130
    finally:
        end_ranks(ranks)
    told = log.read_text()
    assert told.count("signal SIGINT") == 1
    assert "Ctrl-C again: ended at once" in told
    assert "Traceback" not in told


def test_a_rank_that_waits_for_another_ends_at_the_first(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a world of two, the second never starts."""
    log = tmp_path / "log"
    file = configuration(tmp_path, sources, 3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = probe.getsockname()
    variables = {"WORLD_SIZE": "2", "MASTER_PORT": str(place[1])}
    ranks = start_ranks(["train", str(file)], 1, log, own=lambda rank: variables)
    try:
        wait_for(lambda: _answers(place))
        assert ranks[0].pid is not None
        os.kill(ranks[0].pid, signal.SIGINT)
        ranks[0].join(20)
        assert ranks[0].exitcode == 130
    finally:
        end_ranks(ranks)
    lines = log.read_text().splitlines()
    assert [line for line in lines if "interrupted" in line] == [lines[-1]]
    assert "Traceback" not in log.read_text()


def _answers(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(place) == 0


@pytest.mark.parametrize("library", ["plain", "another exception", "swallowed, then an error"])
def test_a_command_ends_with_a_line_whatever_a_library_makes_of_it(
    library: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(options: object) -> int:
        try:
            interrupt()
        except KeyboardInterrupt as error:
            if library == "plain":
                raise
            if library == "another exception":
                raise SystemError("torch's own") from error
        raise OSError("a pipe of a helper is closed")

    monkeypatch.setattr("megalong.commands.run._run_doctor", work)
    assert cli.main(["doctor"]) == 130
    assert capfd.readouterr().err == "megalong: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_ctrl_c_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(options: object) -> int:
        raise SystemError("a bug")

    monkeypatch.setattr("megalong.commands.run._run_doctor", work)
    with pytest.raises(SystemError):
        cli.main(["doctor"])


def test_commands_leave_nothing_half_written(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Interrupted while the file of weights is written: torch, which writes checkpoints, makes its own error of it."""
    imported, there = tmp_path / "imported", set(tmp_path.iterdir())

    def run(*arguments: str) -> None:
        assert cli.main(["checkpoint", *arguments, "--output", str(tmp_path / "out")]) == 130
        told = capfd.readouterr().err
        assert told.splitlines()[-1] == "megalong: interrupted"
        assert "Traceback" not in told
        assert set(tmp_path.iterdir()) == there

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", interrupt)
        run("import", "--hf", str(sources[0]))
    assert cli.main(["checkpoint", "import", "--hf", str(sources[0]), "--output", str(imported)]) == 0
    there.add(imported)
    monkeypatch.setattr(writer, "save_file", interrupt)
    run("export", "--checkpoint", str(imported))


def test_an_adapter_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter.write_adapter(tmp_path / "adapter", Lora(rank=2), {}, torch.float32, base=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (["generate", "--prompt", "x"], "megalong.evaluation.generate._check_tokenizer"),
        (
            ["evaluate", "perplexity", "--data", "DATA", "--seq-length", "32", "--samples", "2"],
            "megalong.evaluation.measure.load_model",
        ),
    ],
)
def test_measuring_ends_with_a_line(
    command: list[str],
    place: str,
    sources: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hf, data = map(str, sources)
    monkeypatch.setattr(place, interrupt)
    assert cli.main([*(data if word == "DATA" else word for word in command), "--hf", hf]) == 130
    told = capfd.readouterr().err
    assert told.splitlines()[-1] == "megalong: interrupted"
    assert "Traceback" not in told


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Interrupt]:
    """A run in the middle of a step at second 1000 of a clock that stands still."""
    now = [1000.0]
    monkeypatch.setattr("megalong.training.interrupt.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("megalong.training.interrupt.control_group", lambda: None)

    def make(done: int, count: int, each: float, into: float, last: float | None = None, may_drop: bool = True) -> Any:
        """`done` of `count` micro-batches took `each`, the present one `into` so far, the last step `last` seconds."""
        interrupt = Interrupt({"SIGTERM": 20.0, "SIGINT": 20.0, "SIGUSR1": 600.0}, may_drop)
        monkeypatch.setattr(interrupt, "_any", lambda mine: mine)
        now[0] = 1000.0 - into - done * each
        if last is not None:
            interrupt.step_took(last)
        interrupt.step_begins(7)
        now[0] = 1000.0 - into
        if count:
            interrupt.reached(done, count)
        now[0] = 1000.0
        return interrupt

    return make


DROPPED = "but has only 20s: it is dropped after this micro-batch, in about 40s, and step 6 is saved"
LATE, LONG = (f"the step needs {seconds} more {DROPPED}" for seconds in ("4m40s", "7m40s"))


@pytest.mark.parametrize(
    ("name", "state", "told"),
    [
        # 3 of 8 done in 60 s each, 20 s into the fourth: 40 s + 4 × 60 s to go.
        ("SIGTERM", (3, 8, 60.0, 20.0), f"is in micro-batch 4 of 8, 1m00s each; {LATE}"),
        ("SIGUSR1", (3, 8, 60.0, 20.0), "is in micro-batch 4 of 8, 1m00s each; the step is finished in about 4m40s"),
        ("SIGTERM", (7, 8, 60.0, 50.0), "is in micro-batch 8 of 8, 1m00s each; the step is finished in about 10s"),
        ("SIGTERM", (0, 8, 0.0, 20.0), "is in micro-batch 1 of 8, and its duration is unknown; the step is dropped"),
        ("SIGTERM", (0, 8, 0.0, 20.0, 480.0), f"is in micro-batch 1 of 8, 1m00s each; {LONG}"),
        ("SIGTERM", (3, 8, 1.0, 0.5, 8.0), "is in micro-batch 4 of 8; the step is finished in about 4s and saved"),
        ("SIGTERM", (3, 8, 60.0, 20.0, 480.0, False), "is in micro-batch 4 of 8; the step is finished in about 4m40s"),
        ("SIGTERM", (0, 0, 0.0, 3.0, 480.0), "waits for its data"),
    ],
)  # fmt: skip
def test_the_line_says_what_follows_and_how_long_it_takes(
    name: str, state: tuple[Any, ...], told: str, at: Callable[..., Interrupt]
) -> None:
    assert at(*state).outlook(signals.Received(name, 1000.0)).startswith(f"step 7 {told}")


def test_what_the_line_says_is_what_is_decided(at: Callable[..., Interrupt], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, each, dropped in (("SIGTERM", 3.0, False), ("SIGTERM", 30.0, True), ("SIGUSR1", 30.0, False)):
        monkeypatch.setattr(signals, "received", lambda: None)
        interrupted = at(3, 8, each, 0.0)
        first = signals.Received(name, 1000.0)
        monkeypatch.setattr(signals, "received", lambda first=first: first)
        assert ("dropped" in interrupted.outlook(first)) == dropped == interrupted._too_late(3, 8)


def test_a_save_is_told_with_its_usual_time(at: Callable[..., Interrupt]) -> None:
    running = at(1, 2, 1.0, 0.0, 2.0)
    running.save_took(75.0)
    running.begins("the validation")
    told = running.outlook(signals.Received("SIGINT", 1000.0))
    assert told == "the run is in the validation; it stops as soon as it can and saves, which takes about 1m15s"
