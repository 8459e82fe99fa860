"""Verify a checkpoint's checksums on all ranks together, while it is loaded.

    small files   at once: they say what the others hold
    tensors       as they pass by, by whoever loads from them (`DirectReader`), and in `finish` what nobody asked for

Each file of tensors is one rank's to check, the one that wrote it if it still has its number: that one loads most of
it. So a checked load reads a disk once, and damage is reported before the loaded state is used.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch.distributed as dist

from megalong.checkpoint.checksum import compared, damages
from megalong.checkpoint.folder import DamagedError, read_meta
from megalong.checkpoint.writing import gathered

_TENSORS = re.compile(r"__(\d+)_\d+\.distcp")


class Verification:
    """Begins to check `checkpoint`; every rank makes one and finishes it.

    Raises:
        DamagedError: a small file is damaged, on all ranks.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        meta = read_meta(checkpoint)
        shares = shared_out(meta.files, dist.get_world_size())
        large = {name for share in shares for name in share}
        small = {name: value for name, value in meta.checksums.items() if name not in large}
        self._agree(damages(checkpoint, small) if dist.get_rank() == 0 else [])
        # An earlier version's checkpoint has no checksums.
        self._mine = {name: meta.checksums[name] for name in shares[dist.get_rank()] if name in meta.checksums}
        self._told: list[str] = []

    def wants(self, name: str) -> bool:
        """Whether a file is this rank's to check, and is not checked yet."""
        return name in self._mine

    def tell(self, name: str, found: str) -> None:
        """Record the checksum of a file that this rank `wants`."""
        self._told += compared(name, self._mine.pop(name), found)

    def finish(self) -> None:
        """Check what is left; all ranks call it.

        Raises:
            DamagedError: a file is not as it was written, on all ranks.
        """
        self._told += damages(self._checkpoint, self._mine)
        self._mine = {}
        self._agree(self._told)

    def _agree(self, told: list[str]) -> None:
        found = [one for part in gathered(told) for one in part]
        if found:
            raise DamagedError(
                f"{self._checkpoint} is damaged: {found[0]}; copy it again, or delete that folder to use the step "
                "before it"
            )


def shared_out(files: dict[str, int], ranks: int) -> list[list[str]]:
    """For each rank the files of tensors it reads: what it wrote, if its number is that of a rank, and then evenly.

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
