"""Write a checkpoint in two phases.

    begin      collective over the world, on the training thread: select this rank's shards, and copy them if asked
    complete   collective over any group of the same ranks, on any thread: write `step-….tmp`, checksums, fsync, rename

A disk error on one rank is raised on all ranks, so that none waits for a rank that failed. The unfinished folder is
then removed, and earlier checkpoints are unchanged.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megalong.checkpoint.checksum import checksum, covered
from megalong.checkpoint.folder import ASSETS, META, SEAL, Meta, copy_assets, file_sizes, publish, write_meta
from megalong.checkpoint.strategy import DeferredSave
from megalong.errors import UserError
from megalong.runtime.distributed import is_main_rank

T = TypeVar("T")
Group = dist.ProcessGroup | None

# Error messages of torch's zip writer when a write to disk fails.
_ZIP_WRITER = ("inline_container", "iostream error")
_MEMORY = Path("/dev/shm")


class SaveError(UserError):
    """A checkpoint could not be written, on some rank; raised on all of them."""


@dataclass(frozen=True)
class Begun:
    """A checkpoint in memory, not yet written.

    Attributes:
        small: Megatron-Core's files other than tensors, by name; on rank 0 only.
    """

    checkpoint: Path
    meta: Meta
    assets: Path | None
    strategy: DeferredSave
    small: dict[str, bytes]


def begin(
    checkpoint: Path,
    state: dict[str, Any],
    meta: Meta,
    assets: Path | None,
    strategy: DeferredSave | None = None,
    **options: Any,
) -> Begun:
    """Let Megatron-Core select the parts of `state` that this rank writes.

    Args:
        strategy: the one of earlier saves of the same state; None: a new one.
        options: further arguments of `dist_checkpointing.save`.
    """
    strategy = strategy or DeferredSave()
    # Megatron-Core writes its small files between collectives. In memory, no disk error can leave ranks waiting.
    folder = Path(tempfile.mkdtemp(prefix="megalong-", dir=_MEMORY if _MEMORY.is_dir() else None))
    try:
        dist_checkpointing.save(state, str(folder), strategy, validate_access_integrity=not strategy.checked, **options)
        small = {path.name: path.read_bytes() for path in folder.iterdir()} if is_main_rank() else {}
    except (OSError, RuntimeError) as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
        raise SaveError(_message(checkpoint, reason)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Begun(checkpoint, meta, assets, strategy, small)


def complete(begun: Begun, group: Group = None) -> None:
    """Write what `begin` collected, and publish it by a rename.

    Raises:
        SaveError: a write failed on some rank.
    """
    checkpoint = begun.checkpoint
    aside = checkpoint.with_name(checkpoint.name + ".tmp")
    try:
        _on_main(lambda: _make_empty(aside), group)
        mine = begun.strategy.write(aside, group)
        checksums = {name: value for part in gathered(mine, group) for name, value in part.items()}
        _on_main(lambda: _publish(begun, aside, checksums), group)
    except (_FailedError, CheckpointException) as error:
        reason = str(error) if isinstance(error, _FailedError) else _disk_failure(error)
        if reason is None:
            raise
        raise SaveError(_message(checkpoint, reason)) from error
    finally:
        if is_main_rank():  # after a success it has been renamed
            shutil.rmtree(aside, ignore_errors=True)


def gathered(mine: T, group: Group = None) -> list[T]:
    """`mine` of every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine, group=group)
    return parts


class _FailedError(Exception):
    """A disk error on some rank."""


def _message(checkpoint: Path, reason: str) -> str:
    return (
        f"checkpoint {checkpoint} could not be written ({reason}); earlier checkpoints are unchanged: make room or "
        "repair the disk, and start again"
    )


def _together(work: Callable[[], T], group: Group) -> list[T]:
    """The result of `work` on every rank. A disk error on one rank is raised on all ranks."""
    result, reason = None, None
    try:
        result = work()
    except (OSError, RuntimeError) as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
    parts = gathered((result, reason), group)
    for _, failure in parts:
        if failure is not None:
            raise _FailedError(failure)
    return [value for value, _ in parts]  # type: ignore[misc]


def _on_main(work: Callable[[], None], group: Group) -> None:
    _together(work if is_main_rank() else lambda: None, group)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_small(begun: Begun, folder: Path) -> None:
    for name, content in begun.small.items():
        (folder / name).write_bytes(content)
    if begun.assets is not None and begun.assets.is_dir():
        copy_assets(begun.assets, folder / ASSETS)


def _publish(begun: Begun, aside: Path, checksums: dict[str, str]) -> None:
    """Write rank 0's files and `megalong.json` with all checksums (`checksums`: of the tensor files), then rename."""
    _write_small(begun, aside)
    sums = {name: checksums.get(name) or checksum(aside / name) for name in covered(aside, (META, SEAL))}
    write_meta(aside, begun.meta.model_copy(update={"files": file_sizes(aside), "checksums": sums}))
    publish(aside, begun.checkpoint)


def _disk_failure(error: BaseException) -> str | None:
    """The disk's error message if a disk error made the save fail, else None.

    torch collects the exceptions of all ranks in a CheckpointException. Its zip writer turns a disk error into a
    RuntimeError.
    """
    causes = [one for one, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause).splitlines()[0]
        if isinstance(cause, RuntimeError) and any(part in str(cause) for part in _ZIP_WRITER):
            return "only a part was written: is the disk full?"
    return None
