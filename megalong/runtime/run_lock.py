"""`RUN/lock`: only one training at a time writes to a run folder.

    {"host": "node7", "process": 4711, "since": "2026-01-31T12:00:00+00:00", "job": "99", "restarts": 0, …}

Rank 0 acquires it before the run writes anything and releases it at the end, also after an error. Commands that only
read the folder (evaluation, export) need no lock.

System locks (flock) do not work on every shared file system. This lock is a file created by a hard link, which is
atomic on NFS and Lustre too; its holder renews the modification time every `BEAT_SECONDS`. A killed run leaves it
behind, and the next start decides whether it is stale:

    same machine       stale if the process is gone, or if its number now belongs to another (by start time)
    same SLURM job     stale if the holder is an earlier start of this job: a requeued job has ended
    anything else      stale after `STALE_SECONDS` without a renewal, by our own clock: clocks of hosts differ

"Same machine" means host, boot and process namespace: containers may share a name and have process numbers of their
own. If two processes find it stale at the same moment, they cannot both keep it: a holder that sees another's file ends
itself. A holder whose file was deleted creates it again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megalong.errors import UserError
from megalong.runtime.amounts import utc_now

FILE = "lock"
BEAT_SECONDS, STALE_SECONDS = 10.0, 90.0
DYING_SECONDS = 3.0  # for a process that was just killed, such as rank 0 with its launcher
STATUS = 1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder.

    Attributes:
        machine: boot and process namespace, "" if unknown.
        started: the process's start, in the clock ticks of /proc; 0 without /proc.
        job, restarts: the SLURM job and its number of restarts; "" and 0 outside SLURM.
        token: unique to this holder.
    """

    host: str
    process: int
    since: str
    machine: str = ""
    started: int = 0
    job: str = ""
    restarts: int = 0
    token: str = ""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} on host {self.host}{job}, since {self.since}"


UNREADABLE = Holder("unknown", 0, "unknown")


def this_process() -> Holder:
    """This process as a holder."""
    return Holder(
        host=socket.gethostname(),
        process=os.getpid(),
        since=utc_now("seconds"),
        machine=_machine(),
        started=_start_of(os.getpid()) or 0,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        token=uuid.uuid4().hex,
    )


def refuse_held(run: Path) -> None:
    """Refuse a run folder that another training holds, and remove a stale lock.

    Waits up to `STALE_SECONDS` for a sign of life from a holder elsewhere.

    Raises:
        UserError: the folder is held.
    """
    while (seen := _read(run)) is not None:
        if not _is_gone(run, *seen):
            raise UserError(
                f"run.dir {run}: another training is writing there ({seen[0]}); wait for it, end it, or choose another "
                "run.dir"
            )
        _remove(run, seen[0])


@contextlib.contextmanager
def held(runs: Sequence[Path]) -> Iterator[None]:
    """Hold these run folders, which are created if missing, for a block.

    Raises:
        UserError: another training holds one of them.
    """
    acquired: list[tuple[Path, Holder]] = []
    ended = threading.Event()
    try:
        for run in dict.fromkeys(runs):
            acquired.append((run, _acquire(run)))
        threading.Thread(target=_renew, args=(acquired, ended), name="run lock", daemon=True).start()
        yield
    finally:
        ended.set()
        for run, holder in acquired:
            seen = _read(run)
            if seen is not None and seen[0].token == holder.token:
                (run / FILE).unlink(missing_ok=True)


def _acquire(run: Path) -> Holder:
    run.mkdir(parents=True, exist_ok=True)
    holder = this_process()
    while True:
        refuse_held(run)
        if _create(run, holder):
            return holder


def _create(run: Path, holder: Holder) -> bool:
    """Create the lock atomically with its content; False if there is one."""
    aside = run / f".{FILE}-{holder.token}"
    try:
        aside.write_text(json.dumps(asdict(holder)) + "\n")
        return _publish(aside, run / FILE)
    finally:
        aside.unlink(missing_ok=True)


def _publish(aside: Path, lock: Path) -> bool:
    """Give `aside` the name `lock`; False if that name is taken."""
    try:
        os.link(aside, lock)
    except FileExistsError:
        return os.stat(aside).st_nlink == 2  # NFS may have done it and lost the reply
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with lock.open("x") as file:
                file.write(aside.read_text())
        except FileExistsError:
            return False
    return True


def _read(run: Path) -> tuple[Holder, int] | None:
    """The holder and when it last renewed its lock (ns, by an unknown clock); None if there is no lock."""
    try:
        # Opened anew each time: NFS asks its server on open.
        with (run / FILE).open() as file:
            renewed = os.fstat(file.fileno()).st_mtime_ns
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Holder(**json.loads(text)), renewed
    except (ValueError, TypeError):
        return UNREADABLE, renewed


def _is_gone(run: Path, holder: Holder, renewed: int) -> bool:
    """Whether the holder has ended without releasing its lock."""
    me = this_process()
    if (holder.host, holder.machine) == (me.host, me.machine) and not _is_hidden(holder.process):
        return _is_ending(holder)
    if holder.job and holder.job == me.job and holder.restarts < me.restarts:
        return True
    print(
        f"megalong: run.dir {run}: held by {holder}; waiting up to {STALE_SECONDS:.0f} s for a sign of life",
        file=sys.stderr,
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        seen = _read(run)
        if seen is None or seen[0] != holder:
            return True  # the lock has changed: the caller looks again
        if seen[1] != renewed:
            return False
    return True


def _is_ending(holder: Holder) -> bool:
    """Whether a process of this machine is gone, or ends within `DYING_SECONDS`."""
    deadline = time.monotonic() + DYING_SECONDS
    while _is_running(holder):
        if time.monotonic() > deadline:
            return False
        time.sleep(DYING_SECONDS / 30)
    return True


def _is_running(holder: Holder) -> bool:
    if holder.started:
        return _start_of(holder.process) == holder.started
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_hidden(process: int) -> bool:
    """Whether this is another user's process that /proc does not show (mounted with hidepid)."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return Path("/proc/self").exists() and not Path(f"/proc/{process}").exists()
    except OSError:
        pass
    return False


def _start_of(process: int) -> int | None:
    """When a process was started, in clock ticks since boot; None if no process with this number is running."""
    try:
        # The name, in parentheses, may contain anything; the state follows it, and the start time is field 22.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _remove(run: Path, stale: Holder) -> None:
    """Remove a stale lock; if another start has just replaced it, put that one back."""
    seen = _read(run)
    if seen is None or seen[0] != stale:
        return
    away = run / f".{FILE}-{uuid.uuid4().hex}"
    try:
        (run / FILE).rename(away)
    except FileNotFoundError:
        return
    try:
        if json.loads(away.read_text()).get("token") != stale.token:
            _publish(away, run / FILE)
    except (ValueError, AttributeError):  # unreadable, so not written by us
        pass
    finally:
        away.unlink(missing_ok=True)


def _renew(acquired: Sequence[tuple[Path, Holder]], ended: threading.Event) -> None:
    """Renew locks until the block ends; end the process if another has taken one."""
    while not ended.wait(BEAT_SECONDS):
        for run, holder in acquired:
            try:
                seen = _read(run)
                if seen is None:
                    _create(run, holder)
                elif seen[0].token == holder.token:
                    os.utime(run / FILE)
                elif not ended.is_set():
                    _end_process(run, seen[0])
            except OSError:  # the file system does not answer, so nobody else can take it either
                continue


def _end_process(run: Path, other: Holder) -> None:
    """Leave the folder to another training: two that write there would ruin both."""
    line = f"megalong: error: run.dir {run}: another training took it ({other}), so this one ends without a save\n"
    os.write(2, line.encode())
    os._exit(STATUS)
