"""Adapters in `peft`'s format: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [rank, in]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, rank]

Only plain LoRA is read, and nothing of another kind is ignored. A setting is read, or is known not to change what the
adapter computes, or must be off. A tensor is the A or B of a module that every layer has, or it is refused by name. The
modules are taken from the tensors, not from `target_modules`, which may be a list, a regular expression or
"all-linear", with exclusions in another key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megalong.config.architecture import Architecture
from megalong.config.lora import ATTENTION, MODULES, Lora
from megalong.errors import UserError
from megalong.hf.config import read_json
from megalong.hf.tensor_file import open_tensors
from megalong.hf.weight_map import hf_shapes
from megalong.runtime.folders import folder_aside, with_default_mode

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_READ = {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights"}
# What the adapter computes does not depend on these. Exclusions show in the tensors; dropout applies only in training;
# how A and B were initialized does not matter after training, unless the base was changed with them (`_INITS`).
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Other initializations (pissa, olora, corda, loftq, lora_ga, ...) subtract the initial A and B from the base weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
_DTYPES = ("F32", "BF16", "F16")
_FIX = "only plain LoRA is read; if peft can merge it into its base (merge_and_unload), start from the merged model"

Shapes = dict[str, tuple[int, ...]]


def tensor_names(module: str) -> tuple[str, str]:
    """Names of A and B of a Hugging Face module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def read_adapter_config(folder: Path) -> Lora:
    """The settings of the adapter in `folder`.

    Raises:
        UserError: it is not an adapter of `peft`, or not plain LoRA on the same modules in every layer.
    """
    return _read(folder, _shapes(folder))


def check_adapter(lora: Lora, architecture: Architecture) -> None:
    """Refuse `lora.load` if the folder's adapter differs from the section or belongs to another model."""
    if lora.load is None:
        return
    folder = Path(lora.load)
    shapes = _shapes(folder)
    found = _read(folder, shapes)
    if found != lora.shape:
        raise UserError(f"lora.load: {lora.load} has {found}, but lora says {lora.shape}; write what the adapter has")
    assert found.rank is not None
    weights, wanted = hf_shapes(architecture), set()
    for module in _modules(architecture.num_layers, found.target_modules):
        rows, columns = weights[f"{module}.weight"]
        for name, shape in zip(tensor_names(module), ((found.rank, columns), (rows, found.rank)), strict=True):
            wanted.add(name)
            if shapes.get(name) != shape:
                have = f"has {name} as {list(shapes[name])}" if name in shapes else f"has no {name}"
                raise UserError(
                    f"lora.load: {folder} {have}, but this model needs {list(shape)}; it belongs to another model"
                )
    if len(shapes) > len(wanted):
        name = next(name for name in shapes if name not in wanted)
        raise UserError(
            f"lora.load: {folder} has {name}, but this model has {architecture.num_layers} layers; it belongs to "
            "another model"
        )


class AdapterReader:
    """The tensors of an adapter folder that `check_adapter` has checked; a source for `Adapter.fill`."""

    def __init__(self, folder: Path) -> None:
        self._file = open_tensors(folder / WEIGHTS, "lora.load: ")

    def __call__(self, module: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of `module`."""
        first, second = (self._file.get_tensor(name) for name in tensor_names(module))
        assert (tuple(first.shape), tuple(second.shape)) == (a, b)
        return first, second


def _shapes(folder: Path) -> Shapes:
    """The shape of every tensor in the adapter's file, from its header."""
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_file() or (folder / name).is_symlink():
            continue
        if name == WEIGHTS and (folder / PICKLE).is_file():
            raise UserError(
                f"lora.load: {folder} has {PICKLE} (a pickle, which can run code when loaded); load it with peft and "
                "save_pretrained(NEW), which writes safetensors"
            )
        raise UserError(f"lora.load: {folder} has no {name}; give a folder that peft's save_pretrained wrote")
    file = open_tensors(folder / WEIGHTS, "lora.load: ")
    shapes: Shapes = {}
    for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise UserError(f"lora.load: {folder}: {name} is stored as {part.get_dtype()}; save it in bf16 or fp32")
        shapes[name] = tuple(part.get_shape())
    return shapes


def _read(folder: Path, shapes: Shapes) -> Lora:
    config = read_json(folder / CONFIG)
    _refuse_settings(folder, config)
    modules = _check_tensors(folder, shapes, config)
    rank, alpha, rs = _positive(config.get("r")), _positive(config.get("lora_alpha")), config.get("use_rslora")
    if rank is None or rank % 1 or alpha is None or not isinstance(rs, bool | None):
        found = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
        raise UserError(f"lora.load: {folder / CONFIG} is damaged ({found}); copy it again")
    return Lora(rank=int(rank), alpha=alpha, rs=bool(rs), target_modules=modules).shape


def _refuse_settings(folder: Path, config: dict[str, Any]) -> None:
    """Refuse every setting that `_read` does not turn into a `Lora` and that may change what the adapter computes."""
    targets = config.get("target_modules")
    if config.get("peft_type") != "LORA":
        raise UserError(f"lora.load: {folder} is a {config.get('peft_type')} adapter, not LORA; {_FIX}")
    if isinstance(targets, list) and {str(target).rpartition(".")[2] for target in targets} - set(MODULES):
        raise UserError(
            f"lora.load: {folder} is a LORA adapter of {targets}; only LORA on {', '.join(MODULES)} is read"
        )
    refused = {key: value for key, value in config.items() if key not in _READ | _HARMLESS and not _off(value)}
    if config.get("bias", "none") not in ("none", None):
        refused["bias"] = config["bias"]
    if config.get("task_type") not in ("CAUSAL_LM", None):
        refused["task_type"] = config["task_type"]
    if config.get("init_lora_weights") not in _INITS:
        refused["init_lora_weights"] = config["init_lora_weights"]
    for key, value in refused.items():
        raise UserError(f"lora.load: {folder} has {key} {str(value)[:60]!r}, which is not read; {_FIX}")


def _check_tensors(folder: Path, shapes: Shapes, config: dict[str, Any]) -> tuple[Any, ...]:
    """The modules that have an A and a B in every layer; any other tensor is refused."""
    found = {name: match.groups() for name in shapes if (match := _TENSOR.fullmatch(name))}
    strange = [name for name in shapes if name not in found or not _belongs(*found[name][1:3])]
    if strange:
        raise UserError(
            f"lora.load: {folder}: tensor {strange[0]} (one of {len(strange)}) is not read; only "
            f"{tensor_names('…')[0]} and B of {', '.join(MODULES)} are; {_FIX}"
        )
    modules = tuple(name for name in MODULES if any(name == groups[2] for groups in found.values()))
    targets, layers = config.get("target_modules"), 1 + max((int(groups[0]) for groups in found.values()), default=0)
    by_name = isinstance(targets, list) and not config.get("exclude_modules")  # else a listed name may have no module
    listed = [target for target in targets if target in MODULES] if by_name and targets else []
    wanted = tuple(name for name in MODULES if name in modules or name in listed)
    for module in _modules(layers, wanted):
        for name in tensor_names(module):
            if name not in shapes:
                raise UserError(
                    f"lora.load: {folder} has no {name}; only adapters of the same modules in every layer are read"
                )
    if not modules:
        raise UserError(f"lora.load: {folder / WEIGHTS} has no tensor; copy it again")
    return modules


def _modules(layers: int, names: tuple[Any, ...]) -> list[str]:
    """Hugging Face names of the modules `names` in `layers` layers."""
    return [f"model.layers.{layer}.{_part(name)}.{name}" for layer in range(layers) for name in names]


def _part(module: str) -> str:
    return "self_attn" if module in ATTENTION else "mlp"


def _belongs(part: str, module: str) -> bool:
    return module in MODULES and part == _part(module)


def _off(value: Any) -> bool:
    """Whether a setting is off; 0 is not, because it can mean layer 0."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _positive(value: Any) -> float | None:
    """A finite number above 0, or None; 8 and 8.0 are the same in JSON."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value < math.inf else None


def write_adapter(
    output: Path,
    lora: Lora,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    base: str | None,
    revision: str | None = None,
) -> None:
    """Write an adapter folder; `base` and `revision` are the model that `peft` loads it onto, if known."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rs,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(lora.target_modules),
    }
    whole = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    with folder_aside(output) as aside:
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(whole, aside / WEIGHTS, metadata={"format": "pt"})
        with_default_mode(aside / WEIGHTS)
