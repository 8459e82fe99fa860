"""Whether a folder can be written to, asked before there is anything to write; that a thing written is on disk; and
that those may read it who may read new files.

A run whose folder lies below a file, on a read-only mount or in someone else's home would otherwise fail in one process
of many, after all of them have started. Asking makes no folder, so a mistake leaves nothing behind.
"""

import os
import stat
from pathlib import Path

from megalong.errors import UserError


def refuse_unwritable(folder: Path, key: str) -> None:
    """Refuse a `folder` that is there but cannot be written to, or is not there and cannot be made.

    Args:
        key: what the user set it with, such as `run.dir`.

    Raises:
        UserError: the folder, or the nearest of its parents that exists, is a file or not writable.
    """
    path = folder.absolute()
    # os.path.exists answers False where Path.exists would raise, such as inside a folder that may not be entered.
    nearest = next(one for one in (path, *path.parents) if os.path.exists(one))
    if not nearest.is_dir():
        raise UserError(f"{key} {folder}: {nearest} is a file, so no folder can be there; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key} {folder}: {nearest} is not writable by this user; choose another")


def with_default_mode(path: Path) -> None:
    """Give a file the mode that new files have where it lies, by the umask and what the folder passes on.

    Libraries that write aside make a file for its owner alone (0600), and keep that when they publish it: a model
    exported to a folder of a group could be read by nobody else of the group.
    """
    probe = path.with_name(f".{path.name}.mode-{os.getpid()}")
    try:
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    except PermissionError:  # file systems without modes
        pass
    finally:
        probe.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk: a rename must not overtake what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
