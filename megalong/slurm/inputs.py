"""Find missing inputs of a run: before its job waits in the queue, and again before its nodes wait.

    model.load.hf checkpoints/Llama: no such folder

Only names are looked up, which takes milliseconds; the files are checked when the run starts. Relative paths belong to
the folder that a job is submitted from, in which it also runs. A run that has a checkpoint resumes from it, so its
initial weights may be gone.

The submitting machine may not see what the nodes see: its file systems may differ, and paths may be inside a container.
Paths that it cannot check are skipped (`seen`); the job's own check, on the first node, checks all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from megalong.config.schema import Config
from megalong.data.corpus.sources import find_files
from megalong.data.indexed import data_path, index_path
from megalong.errors import UserError

Seen = Callable[[str], str | None]


def missing_inputs(config: Config, made: Collection[str] = (), seen: Seen = str) -> list[str]:
    """The missing inputs of `config`, one line each.

    Args:
        made: run folders that earlier stages or jobs make.
        seen: gives the path on this machine for a path in the job; None: this machine cannot check it.
    """
    found = []
    for key, path, look in _inputs(config, [os.path.abspath(folder) for folder in made]):
        here = seen(path)
        why = look(here) if here is not None else None
        if why is not None:
            found.append(f"{key} {path}: {why}")
    return found


def seen_from_here(config: Config) -> Seen:
    """The paths of a job as this machine sees them: through the container's mounts, and only if mounted here."""
    settings = config.slurm
    mounts = [_mount(one) for one in (settings.container_mounts or "").split(",") if one]

    def seen(path: str) -> str | None:
        here = path if settings.container is None else _outside(path, mounts)
        if here is None:
            return None
        top = Path(*Path(os.path.abspath(here)).parts[:2])  # /lustre of /lustre/project/data
        return here if top.exists() else None

    return seen


def _mount(text: str) -> tuple[str, str]:
    """(outside, inside) of pyxis's OUTSIDE[:INSIDE[:FLAGS]], without a slash at their ends."""
    outside, _, rest = text.partition(":")
    return outside.rstrip("/"), (rest.partition(":")[0] or outside).rstrip("/")


def _outside(path: str, mounts: list[tuple[str, str]]) -> str | None:
    """The host's path of a container's path; None: only the container has it.

    If this folder is mounted, the container works in it too, so relative paths are the same inside and outside.
    """
    if not os.path.isabs(path):
        return path if any(f"{os.getcwd()}/".startswith(f"{outside}/") for outside, _ in mounts) else None
    found = (outside + path[len(inside) :] for outside, inside in mounts if f"{path}/".startswith(f"{inside}/"))
    return next(found, None)


def _inputs(config: Config, made: list[str]) -> Iterator[tuple[str, str, Callable[[str], str | None]]]:
    """(key, path, function that says what is wrong with the path) of every input of a run."""
    load = config.model.load
    if load is not None and not _steps(config.run.dir):
        if load.hf is not None:
            yield "model.load.hf", load.hf, _model
        elif load.checkpoint is not None and not _is_below(load.checkpoint, made):
            yield "model.load.checkpoint", load.checkpoint, _checkpoint
        if config.lora.load is not None:
            yield "lora.load", config.lora.load, _folder
    for entry in config.data.mixture if config.task == "pretrain" else ():
        yield f"data.mixture {entry.name}", entry.path, _dataset
        if entry.synthetic is not None and entry.synthetic.tokenizer is not None:
            yield f"data.mixture {entry.name}: synthetic.tokenizer", entry.synthetic.tokenizer, _anything
    if config.task == "sft":
        for source in config.sft.sources:
            yield f"sft.sources {source.name}", source.path, _files
        for benchmark in config.sft.decontaminate:
            yield "sft.decontaminate", benchmark, _files
        if config.sft.tokenizer is not None:
            yield "sft.tokenizer", config.sft.tokenizer, _folder


def _is_below(path: str, folders: list[str]) -> bool:
    whole = os.path.abspath(path)
    return any(whole == folder or whole.startswith(f"{folder}/") for folder in folders)


def _anything(path: str) -> str | None:
    try:
        os.stat(path)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _folder(path: str) -> str | None:
    return _anything(path) or (None if os.path.isdir(path) else "not a folder")


def _model(path: str) -> str | None:
    wrong = _folder(path) or _anything(f"{path}/config.json")
    if wrong is not None:
        return wrong if not os.path.isdir(path) else f"config.json: {wrong}"
    if os.path.exists(f"{path}/model.safetensors"):
        return None
    try:
        shards = json.loads(Path(path, "model.safetensors.index.json").read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "has no model.safetensors, nor shards of one"
    absent = sorted(name for name in set(shards) if not os.path.exists(f"{path}/{name}"))
    return f"{len(absent)} of its shards are missing, the first is {absent[0]}" if absent else None


def _checkpoint(path: str) -> str | None:
    found = _folder(path)
    whole = os.path.exists(f"{path}/megalong.json") or _steps(path)
    return found or (None if whole else "has no checkpoint")


def _steps(run: str) -> list[Path]:
    """The published checkpoints of a run."""
    return list(Path(run).glob("checkpoints/step-*[0-9]/megalong.json"))


def _dataset(path: str) -> str | None:
    for file in (index_path(path), data_path(path)):
        if (wrong := _anything(str(file))) is not None:
            return f"{file.name}: {wrong}"
    return None


def _files(path: str) -> str | None:
    try:
        find_files([path])
    except UserError as error:
        return str(error).removeprefix("--input: ")
    return None
