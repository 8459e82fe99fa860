"""Llama, Mistral and Ministral: one network with the same weights; they differ in the windows of their layers.

    llama        every layer sees everything
    mistral      every layer has `sliding_window`; null means everything
    ministral    `layer_types` lists for each layer: sliding_attention or full_attention

All three use the same mask: with a window of W, a query sees a key if query - key < W, so W tokens, its own included,
which is what `Architecture.window_size` counts. An export keeps the family that the model came with if it can describe
the model's windows, because tokenizer and servers know the model by it. Otherwise it uses the first of `FAMILIES` that
can: a Llama trained with windows becomes a Mistral; a Ministral without windows stays a Ministral. The logits are the
same.

A family is one entry of `FAMILIES`; no other code names a family.

Source: the configurations and masks of transformers 5.23.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalong.config.architecture import Architecture
from megalong.config.rope import whole
from megalong.errors import UserError

WINDOW_FIELDS = ("sliding_window", "layer_types")
_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED_DEFAULTS = {**_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_DEFAULT_WINDOW = 4096


@dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face's.

    Attributes:
        class_name: the class that transformers loads it with.
        defaults: the values of keys that a `config.json` leaves out; the sizes of the model have no default.
        read: `window_size` and `window_attn_skip_freq` of the model that a `config.json` describes; raises UserError
            if `layer_types` is not one known type for each layer, or if the family has no `layer_types`.
        can_describe: whether a `config.json` of this family can describe the windows of a model.
        write: the fields of `config.json` that describe them.
    """

    class_name: str
    defaults: dict[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    can_describe: Callable[[Architecture], bool]
    write: Callable[[Architecture], dict[str, Any]]


def write_family(architecture: Architecture, original: str | None = None) -> dict[str, Any]:
    """Model type, class and windows for `config.json`; `original` is the type that the model came with."""
    possible = [name for name, family in FAMILIES.items() if family.can_describe(architecture)]
    name = original if original in possible else possible[0]
    family = FAMILIES[name]
    return {"model_type": name, "architectures": [family.class_name], **family.write(architecture)}


def _types(architecture: Architecture) -> list[str]:
    return [_FULL if window is None else _SLIDING for window in architecture.layer_windows]


def _read_one_window(config: dict[str, Any]) -> dict[str, Any]:
    if (types := config.get("layer_types")) is not None:
        raise _wrong_types(types, 'a Mistral has one window in all layers; drop it, or write model_type "ministral"')
    return {"window_size": whole(config.get("sliding_window", _DEFAULT_WINDOW))}


def _write_one_window(architecture: Architecture) -> dict[str, Any]:
    return {"sliding_window": architecture.window_size if _SLIDING in _types(architecture) else None}


def _read_layer_types(config: dict[str, Any]) -> dict[str, Any]:
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    window = whole(config.get("sliding_window", _DEFAULT_WINDOW))
    if types is None:
        return {"window_size": window}
    if not isinstance(types, list) or any(kind not in (_SLIDING, _FULL) for kind in types) or len(types) != layers:
        raise _wrong_types(types, f"write {_SLIDING} or {_FULL} for each of the {layers} layers")
    if _SLIDING not in types:
        return {}
    if window is None:
        raise _wrong_types(types, f"{_SLIDING} without sliding_window, its number of tokens; write both")
    pattern = tuple(int(kind == _SLIDING) for kind in types)
    return {"window_size": window, "window_attn_skip_freq": None if all(pattern) else pattern}


def _write_layer_types(architecture: Architecture) -> dict[str, Any]:
    return {**_write_one_window(architecture), "layer_types": _types(architecture)}


def _wrong_types(types: Any, fix: str) -> UserError:
    return UserError(f"layer_types = {json.dumps(types)[:60]}: {fix}")


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _DEFAULTS,
        read=lambda config: {},
        can_describe=lambda architecture: _SLIDING not in _types(architecture),
        write=lambda architecture: {},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _WINDOWED_DEFAULTS,
        read=_read_one_window,
        can_describe=lambda architecture: len(set(_types(architecture))) == 1,
        write=_write_one_window,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        _WINDOWED_DEFAULTS,
        read=_read_layer_types,
        can_describe=lambda architecture: True,
        write=_write_layer_types,
    ),
}
