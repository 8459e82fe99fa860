"""What a rank of the worker pool runs to see what becomes of a damaged checkpoint when a run starts."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.checkpoint.folder import META, whole_checkpoints
from megalong.config.schema import Config
from megalong.runtime import distributed


def starts(settings: dict[str, Any], seeds: list[int | None]) -> list[tuple[str, int, str]]:
    """For each seed: how a run's newest checkpoint was damaged, the step the run then started from, and its state.

    The state is a digest of weights and optimizer. The run's checkpoints are as before afterwards. Seed -1 damages the
    number of the format; None takes the checkpoint away.
    """
    config = Config.model_validate(settings)
    distributed.start(torch.device("cpu"))
    newest = whole_checkpoints(Path(config.run.dir))[-1]
    kept, found = newest.with_name("kept"), []
    for seed in seeds:
        told = ""
        if dist.get_rank() == 0:
            shutil.copytree(newest, kept)
            told = damage(newest, seed)
        dist.barrier()
        found.append((told, *_state(config)))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(newest, ignore_errors=True)
            kept.rename(newest)
        dist.barrier()
    distributed.clear_grid()
    return found


def _state(config: Config) -> tuple[int, str]:
    """(step, digest of what this rank holds) of a run that starts."""
    from megalong.training.setup import set_up

    session, digest = set_up(config, torch.device("cpu")), hashlib.sha256()
    states = (value for one in session.optimizer.state_dict().values() for value in _tensors(one))
    for tensor in (*(parameter for chunk in session.chunks for parameter in chunk.parameters()), *states):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return session.step, digest.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def damage(checkpoint: Path, seed: int | None) -> str:
    """Flip a byte of some file, cut it or remove it; says which."""
    if seed is None:
        shutil.rmtree(checkpoint)
        return "all gone"
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
