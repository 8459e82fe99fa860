"""The folder of a checkpoint, and its `megalong.json`.

    RUN/tokenizer/         copied to the tokenizer/ of each checkpoint
    RUN/checkpoints/step-00000050/
        megalong.json      checksums of the other files, the model's shape, the step, the position in the data, the
                           layout it was saved under
        tokenizer/         tokenizer, generation config and original config.json, so that an export is complete
        *.distcp .metadata Megatron-Core's sharded tensors

A folder is written as `step-00000050.tmp` and renamed when all of it is on disk, so a folder without `.tmp` is
complete. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from megalong.checkpoint.checksum import checksum, damages
from megalong.config.architecture import Architecture
from megalong.config.lora import Lora
from megalong.errors import UserError
from megalong.runtime import megatron
from megalong.runtime.folders import folder_aside, sync

FOLDER = "checkpoints"
META = "megalong.json"
SEAL = "megalong.json.crc32"
ASSETS = "tokenizer"
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # of `precision.params_dtype`
# Files that are copied with the weights: text and tokenizer models, but no weights and no code.
_ASSET_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_FIX = "copy it again, or delete that folder to use the step before it"
_STEP = re.compile(r"step-(\d{8,})")


class DamagedError(UserError):
    """A checkpoint is not as it was written."""


class SavedLayout(BaseModel):
    """The layout a checkpoint was saved under; weights do not depend on it, random states do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    world_size: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int = 1


class Meta(BaseModel):
    """The content of `megalong.json`. Earlier versions wrote no `base`, `files`, `checksums`, `data` and `settings`.

    `optimizer` is the format of the optimizer's state, None if there are only weights.
    `consumed_samples` is the position in the data: samples 0 … consumed_samples - 1 have been trained on.
    `lora` describes the adapters, None without adapters; the checkpoint contains the base weights in any case.
    `base` is the absolute path of the folder that the frozen base weights came from; None if all weights were trained.
    `files` are the bytes of each tensor file, which show a truncated or half-copied checkpoint before it is read.
    `checksums` are those of every file but `megalong.json`.
    `data` is what decided the order of samples (`data.fingerprint`); empty if nothing was trained.
    `guard` is the state of the guard: skipped samples, losses and gradient norms of the last good steps.
    `settings` are the keys of the configuration that the step was trained under and that a resume may change
    (`training.optimizer.recorded`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    step: int
    consumed_samples: int = 0
    architecture: Architecture
    layout: SavedLayout = SavedLayout()
    lora: Lora | None = None
    base: str | None = None
    optimizer: Literal["fully_reshardable", "dp_reshardable"] | None = None
    versions: dict[str, str] = {}
    files: dict[str, int] = {}
    checksums: dict[str, str] = {}
    data: dict[str, Any] = {}
    guard: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    @property
    def dtype(self) -> str:
        """The type that its weights were trained or imported in: `float32`, `bfloat16` or `float16`.

        `architecture.torch_dtype` is the type of the model that a run started from, which may differ.
        """
        trained = self.settings.get("precision.params_dtype")
        return self.architecture.torch_dtype if trained is None else TORCH_DTYPES[trained]


def step_folder(run: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return run / FOLDER / f"step-{step:08d}"


def whole_checkpoints(run: Path) -> list[Path]:
    """Every published checkpoint of a run, oldest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest_good(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint of a run whose file sizes are right, and the later ones with their damage.

    Raises:
        DamagedError: all checkpoints are damaged; it describes the newest.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(whole_checkpoints(run)):
        try:
            read_meta(path)
        except DamagedError as error:
            damaged.append((path, str(error)))
            continue
        return path, damaged
    if damaged:
        raise DamagedError(damaged[0][1])
    return None, damaged


def find_checkpoint(path: Path | str, step: int | None = None) -> Path:
    """The checkpoint that `path` means: itself, or the newest (or the given step) of a run folder.

    Raises:
        UserError: there is no checkpoint, or not that step.
    """
    path = Path(path)
    if (path / META).is_file() and step is None:
        return path
    found = whole_checkpoints(path)
    if step is not None:
        wanted = step_folder(path, step)
        if wanted not in found:
            have = ", ".join(str(int(p.name[5:])) for p in found) or "none"
            raise UserError(f"{path} has no checkpoint of step {step}; it has: {have}")
        return wanted
    if not found:
        raise UserError(
            f"{path} has no checkpoint: give a run folder, a step folder, or what `megalong checkpoint import` wrote"
        )
    return found[-1]


def read_meta(checkpoint: Path) -> Meta:
    """Read `megalong.json`.

    Raises:
        DamagedError: it is missing or damaged, or a file of the checkpoint is missing or has the wrong size.
        UserError: its format or its Megatron-Core is too new for the installed ones.
    """
    file = checkpoint / META
    try:
        values = json.loads(file.read_text())
        if values.get("format") != 1:
            if (checkpoint / SEAL).exists():  # from a later version, or damaged here
                _compare_seal(checkpoint)
            raise UserError(
                f"{file}: format {values.get('format')!r}, but this version reads format 1; update megalong"
            )
        meta = Meta.model_validate(values)
    except FileNotFoundError:
        raise DamagedError(f"{checkpoint} is not a whole checkpoint: it has no {META}; {_FIX}") from None
    except (ValueError, AttributeError) as error:  # not UTF-8, not JSON, not these keys
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{file} is damaged ({str(error).splitlines()[0]}); {_FIX}") from None
    _check_seal(checkpoint, meta)
    _check_files(checkpoint, meta)
    if "megatron-core" in meta.versions:
        megatron.check_readable(checkpoint, meta.versions["megatron-core"])
    return meta


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each tensor file in `checkpoint`: all files but `megalong.json` and those in `tokenizer/`."""
    return {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file() and path.name != META}


def write_meta(checkpoint: Path, meta: Meta) -> None:
    """Write `megalong.json` and, beside it, its own checksum."""
    (checkpoint / META).write_text(meta.model_dump_json(indent=2) + "\n")
    (checkpoint / SEAL).write_text(checksum(checkpoint / META) + "\n")


def verify(checkpoint: Path) -> list[str]:
    """Read a whole checkpoint and report damage, one line each; empty if it is as written.

    If an earlier version wrote it without checksums (`Meta.checksums` is empty), only sizes are compared.
    """
    try:
        meta = read_meta(checkpoint)
    except UserError as error:
        return [str(error)]
    return [f"{checkpoint} is damaged: {damage}" for damage in damages(checkpoint, meta.checksums)]


def _check_seal(checkpoint: Path, meta: Meta) -> None:
    if meta.checksums or (checkpoint / SEAL).exists():  # else from an earlier version
        _compare_seal(checkpoint)


def _compare_seal(checkpoint: Path) -> None:
    try:
        wanted = (checkpoint / SEAL).read_bytes()
    except FileNotFoundError:  # a file without read permission is not damaged
        raise DamagedError(f"{checkpoint} is damaged: {SEAL} is missing; {_FIX}") from None
    if f"{checksum(checkpoint / META)}\n".encode() != wanted:
        raise DamagedError(f"{checkpoint} is damaged: {META} does not match {SEAL}; {_FIX}")


def _check_files(checkpoint: Path, meta: Meta) -> None:
    found = file_sizes(checkpoint)
    for name, size in meta.files.items():
        if found.get(name) != size:
            damage = f"has {found[name]} bytes instead of {size}" if name in found else "is missing"
            raise DamagedError(f"{checkpoint} is damaged: {name} {damage}; {_FIX}")
        if not os.access(checkpoint / name, os.R_OK):  # not a DamagedError: a run would set the checkpoint aside
            raise UserError(f"{checkpoint / name}: this user may not read it (permission denied); ask its owner")


def remove_old(run: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those of every `keep_every`-th step, and unfinished saves.

    Returns:
        The deleted folders.
    """
    old = [
        path
        for path in whole_checkpoints(run)[:-keep_last]
        if keep_every is None or int(path.name.removeprefix("step-")) % keep_every
    ]
    old += list((run / FOLDER).glob("step-*.tmp"))
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return old


def copy_assets(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and config.json of a Hugging Face or assets folder, but no weights or code."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _ASSET_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def keep_assets(run: Path, source: Path) -> Path:
    """Copy these files to `RUN/tokenizer`, because `keep_last` may delete the checkpoint that they come from."""
    kept = run / ASSETS
    if source != kept:
        with folder_aside(kept, replace=True) as aside:
            copy_assets(source, aside)
    return kept


def publish(aside: Path, checkpoint: Path) -> None:
    """Sync everything in `aside` to disk, then rename it: after a power cut the checkpoint is complete or absent."""
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    shutil.rmtree(checkpoint, ignore_errors=True)
    aside.rename(checkpoint)
    sync(checkpoint.parent)
