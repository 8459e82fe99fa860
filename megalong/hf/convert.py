"""`checkpoint import` and `checkpoint export`: Hugging Face folder → sharded checkpoint → Hugging Face folder.

Both build the whole model in one process (TP 1, PP 1) on the CPU, in the dtype that is written, and fill it in place:
import from slices of the mapped files, export from a sharded checkpoint of any layout. The model is in memory once;
shards of the export are views of its parameters. A round trip is bit-exact, because import keeps the stored dtype and
both use megalong.hf.weight_map.

The checkpoint's architecture contains the trained RoPE, length and windows, so an export after a context extension has
them too, with a model type that supports its windows. All other fields of config.json, the tokenizer and the generation
config are the original's, kept in the checkpoint since import.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megalong.checkpoint.folder import (
    ASSETS,
    META,
    Meta,
    copy_assets,
    find_checkpoint,
    read_meta,
    step_folder,
    whole_checkpoints,
)
from megalong.config.architecture import Architecture
from megalong.config.lora import Lora
from megalong.errors import UserError
from megalong.hf.adapter import tensor_names, write_adapter
from megalong.hf.base import absolute_path, hub_name
from megalong.hf.config import CONFIG_FILE, read_architecture, read_json, write_config
from megalong.hf.lengths import raise_lengths
from megalong.hf.load import fill
from megalong.hf.reader import HFReader
from megalong.hf.weight_map import hf_shapes, hf_sources
from megalong.hf.writer import MAX_SHARD_BYTES, check_target, write_folder
from megalong.runtime.folders import refuse_unwritable
from megalong.runtime.grid import Grid
from megalong.runtime.world import console_logging, world

log = logging.getLogger("megalong")
CPU = torch.device("cpu")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def import_hf(hf: str | Path, output: str | Path) -> Path:
    """Convert the Hugging Face folder `hf` to a checkpoint of weights at `output`; returns its step-0 folder.

    Raises UserError if the folder is not a complete, plain Llama, or if the output already has a checkpoint.
    """
    hf, output = Path(hf), Path(output)
    architecture = read_architecture(hf)
    if whole_checkpoints(output) or output.is_file():
        raise UserError(f"{output}: exists already; choose another --output or remove it first")
    refuse_unwritable(output, "--output")
    target = step_folder(output, 0)
    with HFReader(hf) as reader:
        reader.check(architecture)
        dtype = reader.widest_dtype(hf_shapes(architecture))
        architecture = _in_dtype(architecture, dtype)
        with console_logging(), world(CPU, Grid()):
            log.info("importing %s: %s", hf, _summary(architecture))
            if not any((hf / name).is_file() for name in _TOKENIZERS):
                log.warning("%s has no tokenizer: the checkpoint, and exports from it, will have none", hf)
            try:
                _import_weights(reader, architecture, dtype, target)
            finally:
                for empty in (target.parent, output):  # rmdir fails if something was written
                    with contextlib.suppress(OSError):
                        empty.rmdir()
            log.info("imported to %s", target)
    return target


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the checkpoint (a run's newest, its `step`, or a step folder) as a Hugging Face folder to `output`.

    `dtype` is float32, bfloat16 or float16; None keeps the dtype that the weights were trained or imported in. Raises
    UserError if there is no such checkpoint or `output` exists.
    """
    output = Path(output)
    folder = find_checkpoint(checkpoint, step)
    meta = read_meta(folder)
    torch_dtype = _dtype(dtype or meta.dtype)
    architecture = _in_dtype(meta.architecture, torch_dtype)
    check_target(output)
    with tempfile.TemporaryDirectory() as assets, console_logging(), world(CPU, Grid()):
        log.info("exporting %s: %s", folder, _summary(architecture))
        log.info("%s", _about_dtype(meta, dtype))
        config = _prepare_config(architecture, folder / ASSETS, Path(assets))
        # The wider dtype of the two: adapters are merged before rounding.
        held = torch.promote_types(_dtype(meta.dtype), torch_dtype)
        parameters = _load_parameters(folder, architecture, held, meta.lora)
        tensors = _hf_tensors(parameters, architecture)
        write_folder(output, hf_shapes(architecture), tensors, torch_dtype, config, Path(assets), max_shard_bytes)
        log.info("exported to %s", output)
    return output


def _import_weights(reader: HFReader, architecture: Architecture, dtype: torch.dtype, target: Path) -> None:
    """Fill a one-process model from the reader and save it with the folder's tokenizer and config files."""
    # Megatron-Core may only be imported after the process has been prepared for it.
    from megalong.checkpoint.store import save_weights, versions
    from megalong.model.build import build_model
    from megalong.model.config import ModelSettings

    chunks = build_model(architecture, ModelSettings(params_dtype=dtype))
    fill(chunks, reader, architecture)
    meta = Meta(step=0, architecture=architecture, base=absolute_path(reader.folder), versions=versions())
    save_weights(target, chunks, meta, reader.folder)


def export_adapter(
    checkpoint: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
) -> Path:
    """Write the adapters of a checkpoint as a folder that `peft` loads.

    `base` is the model that `peft` loads them onto, a folder or a name on the hub; None: the one that the run started
    from. Raises UserError if there is no such checkpoint, it has no adapters, or `output` exists.
    """
    output = Path(output)
    folder = find_checkpoint(checkpoint, step)
    meta = read_meta(folder)
    if meta.lora is None:
        raise UserError(f"--adapter: {folder} has no adapters; leave --adapter out to export its weights")
    torch_dtype = _dtype(dtype or meta.dtype)
    check_target(output)
    with console_logging(), world(CPU, Grid()):
        from megalong.checkpoint.store import load_weights
        from megalong.model.build import build_model
        from megalong.model.config import ModelSettings
        from megalong.model.lora import adapters

        chunks = build_model(meta.architecture, ModelSettings(params_dtype=torch_dtype, lora=meta.lora))
        load_weights(folder, chunks)
        tensors: dict[str, torch.Tensor] = {}
        for adapter in adapters(chunks[0]):
            tensors.update(zip(tensor_names(adapter.module), (adapter.a, adapter.b), strict=True))
        name, revision = (base, None) if base is not None else hub_name(meta.base) if meta.base else (None, None)
        write_adapter(output, meta.lora, tensors, torch_dtype, name, revision)
        log.info("%s", _about_dtype(meta, dtype))
        log.info("exported the adapters (%s) to %s, for the base %s", meta.lora, output, name or "that is not known")
        for warning in _base_warnings(folder, meta, name):
            log.warning("%s", warning)
    return output


def _base_warnings(folder: Path, meta: Meta, name: str | None) -> Iterator[str]:
    """Reasons why `peft` may not load the base as it was during training."""
    if name is None:
        yield f"{folder} does not say which model its adapters belong to: give peft the base, or write --base NAME"
    elif (Path(name) / META).is_file():
        yield (
            f"{name} is a checkpoint, which peft does not read: export it, and write --base with the folder of that "
            "export"
        )
    if not (folder / ASSETS / CONFIG_FILE).is_file():
        return
    base, trained = read_architecture(folder / ASSETS), meta.architecture
    other = []
    if base.rope != trained.rope:
        other.append(f"rope {trained.rope.type} × {trained.rope.factor:g} (the base has {base.rope.type})")
    if base.layer_windows != trained.layer_windows:
        other.append("another window than the base")
    if other:
        yield (
            f"the adapters were trained with {' and '.join(other)}: load them onto the base with the config.json of an "
            "export without --adapter"
        )


def _load_parameters(
    folder: Path, architecture: Architecture, dtype: torch.dtype, lora: Lora | None
) -> dict[str, torch.Tensor]:
    """The whole model's parameters by local name, loaded from a checkpoint and cast to `dtype` as they are read.

    Adapters are merged into the weights that they adapt.
    """
    from megalong.checkpoint.store import load_weights
    from megalong.model.build import build_model
    from megalong.model.config import ModelSettings
    from megalong.model.lora import merged_parameters

    chunks = build_model(architecture, ModelSettings(params_dtype=dtype, lora=lora))
    load_weights(folder, chunks)
    return merged_parameters(chunks[0])


def _hf_tensors(
    parameters: Mapping[str, torch.Tensor], architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face tensors, in order; a view of the parameter if one piece makes up the tensor."""
    for tensor, sources in hf_sources(architecture):
        parts = [parameters[name].detach().narrow(p.dim, p.local_start, p.length) for name, p in sources]
        yield tensor, parts[0] if len(parts) == 1 else torch.cat(parts, sources[0][1].dim)


def _prepare_config(architecture: Architecture, kept: Path, assets: Path) -> dict[str, Any]:
    """The export's config.json; copies the other files of the checkpoint's `kept` folder into `assets`."""
    if not kept.is_dir():
        return write_config(architecture)
    copy_assets(kept, assets)
    base = read_json(kept / CONFIG_FILE) if (kept / CONFIG_FILE).is_file() else {}
    config = write_config(architecture, base)
    if config["max_position_embeddings"] > base.get("max_position_embeddings", 0):
        raise_lengths(config, assets, config["max_position_embeddings"])
    return config


def _about_dtype(meta: Meta, asked: str | None) -> str:
    """Log line: which dtype is written, and why."""
    own = f"they were {'imported' if meta.optimizer is None else 'trained'} in"
    if asked is not None and asked != meta.dtype:
        return f"weights are written in {asked}, as --dtype says; {own} {meta.dtype}"
    started = meta.architecture.torch_dtype
    other = f" (the model this started from: {started})" if started != meta.dtype else ""
    return f"weights are written in {meta.dtype}, which {own}{other}"


def _in_dtype(architecture: Architecture, dtype: torch.dtype) -> Architecture:
    """The architecture of the same model stored in `dtype`."""
    return architecture.model_copy(update={"torch_dtype": str(dtype).removeprefix("torch.")})


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UserError(f"--dtype {name}: not a dtype of weights; write one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _summary(architecture: Architecture) -> str:
    """Log line: the size of a model."""
    parameters = sum(torch.Size(shape).numel() for shape in hf_shapes(architecture).values())
    windowed = sum(window is not None for window in architecture.layer_windows)
    windows = f" ({windowed} see {architecture.window_size} tokens)" if windowed else ""
    return (
        f"{parameters / 1e9:.3g}B parameters, {architecture.num_layers} layers{windows}, vocabulary "
        f"{architecture.vocab_size}, {architecture.torch_dtype}, rope {architecture.rope.type}, "
        f"{architecture.max_position_embeddings} positions"
    )
