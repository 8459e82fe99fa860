"""Write a Hugging Face folder shard by shard; the folder is either complete or absent.

Everything is written to `DIR.tmp-PID` beside the target and flushed to disk; the last step renames it to `DIR`. A
killed export leaves only a folder with a temporary name. The small files are written after the weights, so even that
folder cannot be loaded while weights are missing.

Shards are planned from the shapes before the first tensor exists, because their number is part of their names
(`model-00002-of-00004.safetensors`). They are filled one at a time, so memory is one shard; tensors that are views of
the model's parameters cost nothing.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megalong.checkpoint.folder import copy_assets
from megalong.errors import UserError
from megalong.hf.config import CONFIG_FILE
from megalong.hf.weight_files import INDEX_FILE, SINGLE_FILE
from megalong.runtime.folders import folder_aside, refuse_unwritable, with_default_mode

log = logging.getLogger("megalong")

MAX_SHARD_BYTES = 5_000_000_000


def check_target(output: Path) -> None:
    """Refuse a target that exists and is not an empty folder, or that cannot be made."""
    taken = any(output.iterdir()) if output.is_dir() else output.exists() or output.is_symlink()
    if taken:
        raise UserError(f"{output}: exists already; choose another --output or remove it first")
    refuse_unwritable(output.absolute().parent, "--output")


def plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Names per shard, in order: a new shard starts when the next tensor would exceed `max_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_folder(
    output: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    config: Mapping[str, Any],
    assets: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole Hugging Face folder to `output`, with a log line after each shard.

    Args:
        shapes: every tensor's name and shape, in the order in which `tensors` yields them.
        tensors: the tensors, on any device; cast to `dtype` when written.
        config: the content of config.json.
        assets: folder whose tokenizer and generation config are copied too.

    Raises:
        UserError: `output` exists and is not empty, or the disk has no room for it.
        RuntimeError: `tensors` does not yield what `shapes` lists.
    """
    check_target(output)
    _check_room(output, shapes, dtype)
    with folder_aside(output) as aside:
        _write_shards(aside, shapes, iter(tensors), dtype, max_shard_bytes)
        if assets is not None:
            copy_assets(assets, aside)
        _write_json(aside / CONFIG_FILE, config)


def _write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    max_bytes: int,
) -> None:
    """Write one safetensors file per planned shard, and the index if there is more than one."""
    shards = plan_shards(shapes, dtype.itemsize, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_gather(names, shapes, tensors, dtype), folder / file, metadata={"format": "pt"})
        with_default_mode(folder / file)
        weight_map.update(dict.fromkeys(names, file))
        log.info("wrote %s (%d of %d)", file, number, len(shards))
    extra = next(tensors, None)
    if extra is not None:
        raise RuntimeError(f"tensor {extra[0]} is not in shapes")
    if len(shards) > 1:
        total = _total_bytes(shapes, dtype)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _gather(
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The next shard's tensors, checked against `shapes`."""
    shard: dict[str, torch.Tensor] = {}
    for wanted in names:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        if name != wanted or tuple(tensor.shape) != shapes[wanted]:
            raise RuntimeError(f"expected tensor {wanted} {shapes[wanted]}, got {name} {tuple(tensor.shape)}")
        shard[name] = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return shard


def _total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


def _check_room(output: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Refuse to start if the disk has too little room."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    needed, free = _total_bytes(shapes, dtype), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{output}: needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free; choose another disk"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
