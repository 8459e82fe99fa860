"""What a rank of the worker pool runs to see what becomes of a damaged checkpoint when a run starts."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.checkpoint.folder import META, whole_checkpoints
from megalong.config.schema import Config
from megalong.runtime import distributed


def starts(settings: dict[str, Any], seeds: list[int]) -> list[tuple[str, str]]:
    """For each seed: how the newest checkpoint of a run was damaged, and which one the run then started from.

    The run's checkpoints are as before afterwards. Seed -1 damages the number of the format.
    """
    config = Config.model_validate(settings)
    distributed.start(torch.device("cpu"))
    from megalong.training.setup import _undamaged_start

    newest = whole_checkpoints(Path(config.run.dir))[-1]
    kept, found = newest.with_name("kept"), []
    for seed in seeds:
        told = ""
        if dist.get_rank() == 0:
            shutil.copytree(newest, kept)
            told = damage(newest, seed)
        dist.barrier()
        resumed = _undamaged_start(config).resume
        assert resumed is not None
        found.append((told, resumed.name))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(newest, ignore_errors=True)
            kept.rename(newest)
        dist.barrier()
    return found


def damage(checkpoint: Path, seed: int) -> str:
    """Flip a byte of some file, cut it or remove it; says which."""
    numbers = random.Random(seed)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = checkpoint / META if seed < 0 else numbers.choice(files)
    content = path.read_bytes()
    how = "flip" if seed < 0 else numbers.choice(["flip", "flip", "cut", "gone"])
    if how == "gone":
        path.unlink()
        return f"{path.name} gone"
    at = content.index(b'"format": 1') + 10 if seed < 0 else numbers.randrange(len(content))
    if how == "cut":
        path.write_bytes(content[:at])
        return f"{path.name} cut to {at}"
    flipped = 9 if seed < 0 else numbers.randrange(1, 256)
    path.write_bytes(content[:at] + bytes([content[at] ^ flipped]) + content[at + 1 :])
    return f"{path.name} byte {at} flipped by {flipped}"
