"""Llama, Mistral and Ministral: one network with the same weights, told apart by how far back its layers see.

    llama        every layer sees everything
    mistral      every layer has `sliding_window`; null is everything
    ministral    `layer_types` says layer by layer: sliding_attention or full_attention

All three mask alike: with a window of W a query sees a key if query - key < W, so W tokens, its own included, which is
what `Architecture.window_size` counts. A model leaves under the name it came with where that name can say its windows
(its tokenizer and servers know it by that), and otherwise under the first in this list that can: a Llama trained in
windows leaves as a Mistral, and a Ministral whose windows were taken away stays one. The logits are the same.

Source: the configurations and masks of transformers 5.23.
"""

import json
from typing import Any

from megalong.config.architecture import Architecture
from megalong.config.rope import whole
from megalong.errors import UserError

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"}
WINDOW_FIELDS = ("sliding_window", "layer_types")
_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_DEFAULT_WINDOW = 4096


def defaults(model_type: str) -> dict[str, Any]:
    """What a key that a `config.json` leaves out means to transformers; the sizes of the model have no default."""
    return _DEFAULTS if model_type == "llama" else {**_DEFAULTS, **_WINDOWED_DEFAULTS}


def read_windows(config: dict[str, Any]) -> dict[str, Any]:
    """`window_size` and `window_attn_skip_freq` of the model that `config` describes.

    Raises:
        UserError: `layer_types` that are not one known type for each layer, or that the model type does not read.
    """
    if config["model_type"] == "llama":
        return {}
    window, types = whole(config.get("sliding_window", _DEFAULT_WINDOW)), config.get("layer_types")
    if types is None:
        return {"window_size": window}
    if config["model_type"] == "mistral":
        raise _wrong_types(types, 'a Mistral has one window in all layers; drop it, or write model_type "ministral"')
    layers = config.get("num_hidden_layers")
    if not isinstance(types, list) or any(kind not in (_SLIDING, _FULL) for kind in types) or len(types) != layers:
        raise _wrong_types(types, f"write {_SLIDING} or {_FULL} for each of the {layers} layers")
    if _SLIDING not in types:
        return {}
    if window is None:
        raise _wrong_types(types, f"{_SLIDING} without sliding_window, the tokens it sees; write both")
    pattern = tuple(int(kind == _SLIDING) for kind in types)
    return {"window_size": window, "window_attn_skip_freq": None if all(pattern) else pattern}


def write_windows(architecture: Architecture, original: str | None = None) -> dict[str, Any]:
    """Model type, class and windows as `config.json` has them; `original` is the type the model came with."""
    windows = architecture.layer_windows
    types = [_FULL if window is None else _SLIDING for window in windows]
    can_say = ["mistral", "ministral"] if len(set(types)) == 1 else ["ministral"]
    if _SLIDING not in types:
        can_say.insert(0, "llama")
    name = original if original in can_say else can_say[0]
    fields: dict[str, Any] = {"model_type": name, "architectures": [CLASSES[name]]}
    if name != "llama":
        fields["sliding_window"] = architecture.window_size if _SLIDING in types else None
    if name == "ministral":
        fields["layer_types"] = types
    return fields


def _wrong_types(types: Any, mend: str) -> UserError:
    return UserError(f"layer_types = {json.dumps(types)[:60]}: {mend}")
