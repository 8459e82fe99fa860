"""One training in a run folder: who is refused, which locks are stale, and that two never keep one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megalong.errors import UserError
from megalong.runtime import run_lock
from megalong.runtime.run_lock import Holder, held, refuse_held, this_process


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.05), ("STALE_SECONDS", 0.5), ("DYING_SECONDS", 0.2)):
        monkeypatch.setattr(run_lock, name, seconds)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def left_behind(run: Path, holder: Holder) -> None:
    run.mkdir(exist_ok=True)
    (run / "lock").write_text(json.dumps(asdict(holder)))


def elsewhere(**values: object) -> Holder:
    return replace(this_process(), host="other", machine="another boot", token="theirs", **values)  # type: ignore[arg-type]


@contextmanager
def renewed(run: Path) -> Iterator[None]:
    """Another host's holder is alive, by a clock of its own that is a day behind."""
    ended = threading.Event()

    def renew() -> None:
        moment = time.time() - 86400
        while not ended.wait(0.05):
            moment += 10
            os.utime(run / "lock", (moment, moment))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_second_is_told_who_holds_it_and_the_first_gives_it_back(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with held([run, run, tmp_path / "b"]):
        with pytest.raises(UserError) as error, held([run]):
            pass
        told = json.loads((run / "lock").read_text())
        assert f"process {os.getpid()} on host {os.uname().nodename}, since {told['since']}" in str(error.value)
        assert str(run) in str(error.value)
        with pytest.raises(UserError):
            refuse_held(tmp_path / "b")
    assert [path.name for path in run.iterdir()] == []
    with held([run]):
        pass


def test_asking_makes_no_folder(tmp_path: Path) -> None:
    refuse_held(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


STALE: dict[str, Callable[[], Holder]] = {
    "process gone": lambda: replace(this_process(), process=ended_process(), started=5),
    "its number is another's": lambda: replace(this_process(), started=this_process().started - 1),
    "another host, no sign of life": elsewhere,
    "after a reboot": lambda: replace(this_process(), machine="an earlier boot"),
    "an earlier start of this job": lambda: elsewhere(job="77", restarts=1),
}


@pytest.mark.parametrize("why", STALE)
def test_a_killed_run_is_no_hindrance(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    if "job" in why:
        monkeypatch.setattr(run_lock, "STALE_SECONDS", 1000.0)  # at once, without waiting
    left_behind(tmp_path, STALE[why]())
    with held([tmp_path]):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    """Killed with its launcher, but not waited for yet."""
    code = "import sys; sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        left_behind(
            tmp_path, replace(this_process(), process=process.pid, started=run_lock._start_of(process.pid) or 0)
        )
        with pytest.raises(UserError):
            refuse_held(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        refuse_held(tmp_path)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("holder", [elsewhere(), elsewhere(job="77"), None], ids=["host", "same job", "unreadable"])
def test_a_sign_of_life_from_elsewhere_refuses(
    holder: Holder | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    if holder is None:
        (tmp_path / "lock").write_text("{")
    else:
        left_behind(tmp_path, holder)
    with renewed(tmp_path), pytest.raises(UserError, match="another training is writing there"), held([tmp_path]):
        pass
    assert (tmp_path / "lock").exists()


def test_a_holder_renews_and_makes_a_deleted_lock_again(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held([tmp_path]):
        before = lock.stat().st_mtime_ns
        wait_for(lambda: lock.stat().st_mtime_ns != before)
        lock.unlink()
        wait_for(lock.exists)
        with pytest.raises(UserError):
            refuse_held(tmp_path)


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with held([tmp_path]), pytest.raises(UserError), held([tmp_path]):
        pass
    assert not list(tmp_path.iterdir())


def test_who_has_lost_the_folder_ends(tmp_path: Path) -> None:
    def hold() -> None:
        with held([tmp_path]):
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    wait_for((tmp_path / "lock").exists)
    left_behind(tmp_path, elsewhere())
    process.join(20)
    assert process.exitcode == 1
    assert json.loads((tmp_path / "lock").read_text())["token"] == "theirs"


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()

    def start() -> None:
        barrier.wait()
        try:
            with held([tmp_path]):
                results.put("held")
                time.sleep(1.5)
        except UserError:
            results.put("refused")

    left_behind(tmp_path, replace(this_process(), started=1))
    processes = [context.Process(target=start) for _ in range(6)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=20) for _ in processes) == ["held", *["refused"] * 5]
    for process in processes:
        process.join()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
