"""Adapters in `peft`'s format: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [rank, in]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, rank]

Only plain LoRA is read: a folder with biases, trained embeddings, DoRA or ranks by module says so in one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megalong.config.lora import MODULES, Lora
from megalong.errors import UserError
from megalong.hf.config import read_json
from megalong.runtime.folders import with_default_mode

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What plain LoRA does not have; falsy, absent or these values where it is not used.
_UNREAD: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "modules_to_save": (),
    "fan_in_fan_out": (),
    "layers_to_transform": (),
}


def tensor_names(module: str) -> tuple[str, str]:
    """Names of A and B of a Hugging Face module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def read_adapter_config(folder: Path) -> Lora:
    """What the adapter in `folder` is.

    Raises:
        UserError: it is no adapter of `peft`, or none of plain LoRA on a Llama's linear layers.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"lora.load: {folder} holds no {name}; give a folder that peft's save_pretrained wrote")
    config = read_json(folder / CONFIG)
    for key, allowed in _UNREAD.items():
        if config.get(key) and config[key] not in allowed:
            raise UserError(
                f"lora.load: {folder} has {key} {config[key]!r}, which is not read; merge it with peft first"
            )
    modules = config.get("target_modules")
    if config.get("peft_type") != "LORA" or not isinstance(modules, list) or set(modules) - set(MODULES):
        raise UserError(
            f"lora.load: {folder} is a {config.get('peft_type')} adapter of {modules}; only LORA beside "
            f"{', '.join(MODULES)} is read"
        )
    try:
        return Lora(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rs=bool(config.get("use_rslora")),
            target_modules=tuple(modules),
        ).shape
    except (KeyError, TypeError, ValueError):
        found = {key: config.get(key) for key in ("r", "lora_alpha")}
        raise UserError(f"lora.load: {folder / CONFIG} is damaged ({found}); copy it again") from None


def check_adapter(lora: Lora) -> None:
    """Refuse `lora.load` where the folder's adapter is not what the section says."""
    if lora.load is None:
        return
    found = read_adapter_config(Path(lora.load))
    if found != lora.shape:
        raise UserError(f"lora.load: {lora.load} has {found}, but lora says {lora.shape}; write what the adapter has")


class AdapterReader:
    """The tensors of an adapter folder, called as `Adapter.fill` calls its source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._file = safe_open(folder / WEIGHTS, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"lora.load: {folder / WEIGHTS} cannot be read ({error}); copy it again") from None

    def __call__(self, module: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of `module`; UserError where they are absent or of another model's shape."""
        found = []
        for name, shape in zip(tensor_names(module), (a, b), strict=True):
            try:
                tensor = self._file.get_tensor(name)
            except SafetensorError:
                raise UserError(f"lora.load: {self.folder} has no {name}; it is another model's adapter") from None
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"lora.load: {self.folder}: {name} is {list(tensor.shape)}, this model needs {list(shape)}; give "
                    "an adapter of this model"
                )
            found.append(tensor)
        return found[0], found[1]


def write_adapter(
    output: Path, lora: Lora, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, base: str | None
) -> None:
    """Write an adapter folder; `base` is what `peft` should load it onto, where that is known."""
    output.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rs,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(lora.target_modules),
    }
    (output / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    whole = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(whole, output / WEIGHTS, metadata={"format": "pt"})
    with_default_mode(output / WEIGHTS)
