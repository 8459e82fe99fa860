"""`RUN/lock`: one training at a time writes to a run folder.

    {"host": "node7", "process": 4711, "since": "2026-01-31T12:00:00+00:00", "job": "99", "restarts": 0, …}

Rank 0 takes it before the run writes anything and gives it back at the end, also after an error. Whatever only reads
the folder (evaluation, export) needs no lock.

Locks of the system (flock) do not reach over every shared file system. This one is a file that is made by a hard link,
which is atomic on NFS and Lustre too, and whose time of change its holder renews every `BEAT_SECONDS`. A killed run
leaves it behind, and the next start finds out by itself:

    same machine       is the process gone, or is it another one of that number (by its time of start)? then it is stale
    same SLURM job     an earlier start of this job is over: a job that is requeued has ended
    anything else      stale once `STALE_SECONDS` pass by our own clock without a renewal: clocks of hosts differ

"Same machine" means host, boot and process namespace: containers may share a name and count processes on their own.
Two that find it stale at the same moment cannot both keep it: a holder whose file is another's ends itself. One whose
file was deleted makes it again.
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
DYING_SECONDS = 3.0  # of a process that was killed just now, such as rank 0 with its launcher
STATUS = 1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder.

    Attributes:
        machine: boot and process namespace, "" where the system does not tell.
        started: the process's start, in the clock ticks of /proc; 0 where there is no /proc.
        job, restarts: SLURM's job and how often it was started again; "" and 0 outside.
        token: no other holder has it.
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
    """The holder that this process would be."""
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
    """Refuse a run folder that another training holds, and remove the lock of one that is gone.

    Waits up to `STALE_SECONDS` for a sign of life of a holder elsewhere.

    Raises:
        UserError: it is held.
    """
    while (seen := _look(run)) is not None:
        if not _is_gone(run, *seen):
            raise UserError(
                f"run.dir {run}: another training is writing there ({seen[0]}); wait for it or end it, or give another "
                "run.dir"
            )
        _remove(run, seen[0])


@contextlib.contextmanager
def held(runs: Sequence[Path]) -> Iterator[None]:
    """Hold these run folders, which are made where they are missing, for a block.

    Raises:
        UserError: another training holds one of them.
    """
    taken: list[tuple[Path, Holder]] = []
    ended = threading.Event()
    try:
        for run in dict.fromkeys(runs):
            taken.append((run, _take(run)))
        threading.Thread(target=_renew, args=(taken, ended), name="run lock", daemon=True).start()
        yield
    finally:
        ended.set()
        for run, holder in taken:
            seen = _look(run)
            if seen is not None and seen[0].token == holder.token:
                (run / FILE).unlink(missing_ok=True)


def _take(run: Path) -> Holder:
    run.mkdir(parents=True, exist_ok=True)
    holder = this_process()
    while True:
        refuse_held(run)
        if _make(run, holder):
            return holder


def _make(run: Path, holder: Holder) -> bool:
    """Make the lock with its whole content at once; False where there is one."""
    aside = run / f".{FILE}-{holder.token}"
    try:
        aside.write_text(json.dumps(asdict(holder)) + "\n")
        return _publish(aside, run / FILE)
    finally:
        aside.unlink(missing_ok=True)


def _publish(aside: Path, lock: Path) -> bool:
    """Give `aside` the name `lock` unless something has it; False if so."""
    try:
        os.link(aside, lock)
    except FileExistsError:
        return os.stat(aside).st_nlink == 2  # NFS may have done it and lost the answer
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with lock.open("x") as file:
                file.write(aside.read_text())
        except FileExistsError:
            return False
    return True


def _look(run: Path) -> tuple[Holder, int] | None:
    """The holder and when it last renewed its lock (ns, by whatever clock); None where there is no lock."""
    try:
        # Opened for each look: that is when NFS asks its server.
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
    """Whether the holder has ended without giving its lock back."""
    me = this_process()
    if (holder.host, holder.machine) == (me.host, me.machine) and not _is_hidden(holder.process):
        return _ends_soon(holder)
    if holder.job and holder.job == me.job and holder.restarts < me.restarts:
        return True
    print(
        f"megalong: run.dir {run}: it was held by {holder}; waiting up to {STALE_SECONDS:.0f} s for a sign of life",
        file=sys.stderr,
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        seen = _look(run)
        if seen is None or seen[0] != holder:
            return True  # there is another state to look at
        if seen[1] != renewed:
            return False
    return True


def _ends_soon(holder: Holder) -> bool:
    """Whether a process of this machine is gone, or goes within a moment."""
    deadline = time.monotonic() + DYING_SECONDS
    while _runs(holder):
        if time.monotonic() > deadline:
            return False
        time.sleep(DYING_SECONDS / 30)
    return True


def _runs(holder: Holder) -> bool:
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
    """Whether another user's process runs here that /proc does not show (mounted with hidepid)."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return Path("/proc/self").exists() and not Path(f"/proc/{process}").exists()
    except OSError:
        pass
    return False


def _start_of(process: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None where none of that number runs any more."""
    try:
        # The name, in parentheses, may hold anything; the state follows it, and the start is the 22nd field of all.
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
    """Take a stale lock away; one that another start has put there meanwhile is put back."""
    seen = _look(run)
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
    except (ValueError, AttributeError):  # not readable: no holder of ours
        pass
    finally:
        away.unlink(missing_ok=True)


def _renew(taken: Sequence[tuple[Path, Holder]], ended: threading.Event) -> None:
    """Renew locks until the block ends; end the process where one is another's by now."""
    while not ended.wait(BEAT_SECONDS):
        for run, holder in taken:
            try:
                seen = _look(run)
                if seen is None:
                    _make(run, holder)
                elif seen[0].token == holder.token:
                    os.utime(run / FILE)
                elif not ended.is_set():
                    _end(run, seen[0])
            except OSError:  # the file system does not answer: nobody else can take it either
                continue


def _end(run: Path, other: Holder) -> None:
    """Leave the folder to another: two that write there would spoil both."""
    told = f"megalong: error: run.dir {run}: another training took it ({other}), so this one ends without a save\n"
    os.write(2, told.encode())
    os._exit(STATUS)
