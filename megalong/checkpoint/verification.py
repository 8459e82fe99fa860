"""Verify a checkpoint's checksums on all ranks together, while it is loaded.

    small files    at once, because they describe the others
    tensor files   while `DirectReader` loads from them; `finish` checks those that were not loaded

Each tensor file is checked by one rank: by the rank that wrote it, if there is a rank of that number, because that one
loads most of it. So a verified load reads the disk once, and damage is reported before the loaded state is used.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch.distributed as dist

from megalong.checkpoint.checksum import damages, mismatch
from megalong.checkpoint.folder import DamagedError, read_meta
from megalong.checkpoint.writing import gathered

_TENSORS = re.compile(r"__(\d+)_\d+\.distcp")


class Verification:
    """The verification of `checkpoint`; every rank creates one and calls `finish`.

    Raises:
        DamagedError: a small file is damaged; raised on all ranks.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        meta = read_meta(checkpoint)
        shares = assign_files(meta.files, dist.get_world_size())
        large = {name for share in shares for name in share}
        small = {name: value for name, value in meta.checksums.items() if name not in large}
        self._raise_if_damaged(damages(checkpoint, small) if dist.get_rank() == 0 else [])
        # A checkpoint of an earlier version has no checksums.
        self._mine = {name: meta.checksums[name] for name in shares[dist.get_rank()] if name in meta.checksums}
        self._damage: list[str] = []

    def wants(self, name: str) -> bool:
        """Whether this rank must check a file and has not yet done so."""
        return name in self._mine

    def record(self, name: str, found: str) -> None:
        """Record the checksum of a file that this rank `wants`."""
        self._damage += mismatch(name, self._mine.pop(name), found)

    def finish(self) -> None:
        """Check the remaining files; all ranks call it.

        Raises:
            DamagedError: a file is not as it was written; raised on all ranks.
        """
        self._damage += damages(self._checkpoint, self._mine)
        self._mine = {}
        self._raise_if_damaged(self._damage)

    def _raise_if_damaged(self, damage: list[str]) -> None:
        found = [one for part in gathered(damage) for one in part]
        if found:
            raise DamagedError(
                f"{self._checkpoint} is damaged: {found[0]}; copy it again, or delete that folder to use the step "
                "before it"
            )


def assign_files(files: dict[str, int], ranks: int) -> list[list[str]]:
    """For each rank the tensor files that it checks: those it wrote; files of other ranks are distributed evenly.

    Args:
        files: bytes by name.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(files, key=lambda name: (-files[name], name)):
        match = _TENSORS.fullmatch(name)
        if match is None:
            continue
        writer = int(match[1])
        rank = writer if writer < ranks else load.index(min(load))
        shares[rank].append(name)
        load[rank] += files[name]
    return shares
