"""Check outputs before anything is written, write files and folders atomically and durably, and set file modes.

A run whose folder is below a file, on a read-only mount or in someone else's home would otherwise fail in one process
of many, after all of them have started. The checks create nothing, so a mistake leaves nothing behind.
"""

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalong.errors import UserError


def refuse_unwritable(folder: Path, key: str) -> None:
    """Refuse a `folder` that exists but is not writable, or that cannot be created.

    Args:
        key: the setting that names it, such as `run.dir`.

    Raises:
        UserError: the folder, or the nearest of its parents that exists, is a file or not writable.
    """
    path = folder.absolute()
    # os.path.exists returns False where Path.exists would raise, such as inside a folder without permission.
    nearest = next(one for one in (path, *path.parents) if os.path.exists(one))
    if not nearest.is_dir():
        raise UserError(f"{key} {folder}: {nearest} is a file, so no folder can be there; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key} {folder}: {nearest} is not writable by this user; choose another")


def refuse_overwriting(paths: Iterable[Path], key: str, overwrite: bool) -> None:
    """Refuse to overwrite existing files unless `overwrite` is set.

    Args:
        key: the option that names the output, such as `--output`.

    Raises:
        UserError: one of `paths` exists, and `overwrite` is not set.
    """
    for path in paths if not overwrite else ():
        if os.path.lexists(path):
            raise UserError(f"{key}: {path} exists already; give another, or write --overwrite")


def one_each(path: str | None, names: Sequence[str]) -> list[Path]:
    """`path` for a single name, `STEM-NAME` beside it for each of several names; empty without a path."""
    if path is None:
        return []
    return [Path(path)] if len(names) == 1 else [Path(path).with_stem(f"{Path(path).stem}-{name}") for name in names]


def with_default_mode(path: Path) -> None:
    """Give a file the mode of new files in its folder, by the umask and the folder's default permissions.

    Libraries that write to a temporary file create it for its owner alone (0600) and keep that mode when they rename
    it: nobody else in a group could read a model exported to the group's folder.
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
    """Wait until a file, or a folder's list of names, is on disk: a rename must not overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_aside(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path to write to beside `path`. It becomes `path` when the block ends, and is removed if the block raises.

    Args:
        durable: wait until the file and its name are on disk, so that it survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
        if durable:
            sync(path.absolute().parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(output: Path, replace: bool = False) -> Iterator[Path]:
    """A fresh folder beside `output`. It becomes `output` when the block ends and all of it is on disk, and is removed
    if the block raises.

    Args:
        replace: remove a folder `output` first; without it, one that is not empty is an `OSError`.
    """
    aside = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*sorted(aside.rglob("*")), aside]:
            sync(path)
        if replace:
            shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)
        sync(output.absolute().parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
