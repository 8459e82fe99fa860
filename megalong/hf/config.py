"""`config.json` of a Llama, Mistral or Ministral to an `Architecture` and back, read as plain JSON.

A model that cannot be trained faithfully is refused with the key that says so, never read as something similar: another
`model_type`, biases, another activation, a quantized checkpoint, code shipped with the model (which is never run).
Missing keys have the defaults of transformers' configurations; the sizes of the model have no default.

Export starts from the original `config.json` if there is one, so unknown fields are kept. It writes fields that
transformers has renamed under both names: `torch_dtype` and `dtype`, and the RoPE fields as `megalong.rope` spells
them. The length that a model was extended to is the architecture's `max_position_embeddings`; its `model_type` depends
on its windows (`megalong.hf.family`).
"""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalong.config.architecture import Architecture
from megalong.config.rope import whole
from megalong.errors import UserError
from megalong.hf.family import FAMILIES, WINDOW_FIELDS, write_family
from megalong.hf.weight_files import ADAPTER_FILE
from megalong.rope.hf import from_hf, to_hf
from megalong.runtime.files import why_unreadable

CONFIG_FILE = "config.json"
_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_FRACTIONS = {"rms_norm_eps"}
_OPTIONAL = {"num_key_value_heads", "head_dim"}
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
# Fields that training replaces, or that are true only of the folder the model came from.
_DROPPED = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "_name_or_path",
    "pretraining_tp",
    *WINDOW_FIELDS,
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if the file contains something else or is missing."""
    if not path.is_file() and not path.is_symlink():
        raise UserError(f"{path}: no such file; give the folder of a whole Hugging Face checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {why_unreadable(path, error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: contains a {type(content).__name__}, not an object of settings; download it again")
    return content


def read_architecture(hf_dir: str | Path) -> Architecture:
    """The architecture that `hf_dir/config.json` describes.

    A config without a dtype means float32, as in transformers. Raises UserError, one line, for a missing or malformed
    file and for every model that is not a plain Llama, Mistral or Ministral.
    """
    path = Path(hf_dir) / CONFIG_FILE
    if not path.is_file() and not path.is_symlink():
        raise UserError(f"{path}: no such file; {_where_a_model_is(Path(hf_dir))}")
    config = read_json(path)
    _refuse_other_models(path, config)
    try:
        windows = FAMILIES[config["model_type"]].read(config)
        return Architecture.model_validate(
            {**_fields(path, config), **windows, "rope": from_hf(config), "torch_dtype": _dtype(config)}
        )
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def write_config(architecture: Architecture, base_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of `config.json` for `architecture`, as trained.

    `base_config` is the checkpoint's original config.json: fields of the architecture are overridden, all others kept.
    A model with the same positions as `base_config` keeps its `max_position_embeddings`.
    """
    config = {key: value for key, value in (base_config or {}).items() if key not in _DROPPED}
    config.update(_FIXED)
    config.update({theirs: getattr(architecture, ours) for theirs, ours in _FIELDS.items()})
    config.update(write_family(architecture, config.get("model_type")))
    config.update(to_hf(architecture.rope, architecture.max_position_embeddings, architecture.kv_channels))
    if _same_positions(architecture, base_config):
        config["max_position_embeddings"] = architecture.max_position_embeddings
    config.update(torch_dtype=architecture.torch_dtype, dtype=architecture.torch_dtype)
    return config


def _same_positions(architecture: Architecture, base_config: dict[str, Any] | None) -> bool:
    """Whether `architecture` has the RoPE and the length of the model that `base_config` describes."""
    if not base_config:
        return False
    try:
        rope = from_hf(base_config)
    except UserError:
        return False
    longest = base_config.get("max_position_embeddings")
    return rope == architecture.rope and whole(longest) == architecture.max_position_embeddings


def _where_a_model_is(folder: Path) -> str:
    """Advice on what to give instead of a folder without config.json."""
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return f"if it is a model on the Hugging Face hub, download it first: hf download {folder} --local-dir DIR"
    if (folder / ADAPTER_FILE).is_file():
        return f"the folder contains an adapter; give its base model here, and write lora.load: {folder}"
    inner = sorted([*folder.glob(f"snapshots/*/{CONFIG_FILE}"), *folder.glob(f"*/{CONFIG_FILE}")])
    return f"give {inner[0].parent}" if inner else "give the folder of a whole Hugging Face checkpoint"


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    """Raise UserError for everything that is not a plain, unquantized Llama, Mistral or Ministral."""
    names = list(FAMILIES)
    refused = (
        ("auto_map", config.get("auto_map") is not None, "code shipped with a model is never run; use a plain Llama"),
        ("model_type", config.get("model_type") not in names, f"supported are {', '.join(names)}; write which it is"),
        ("quantization_config", config.get("quantization_config") is not None, "use the bf16, fp16 or fp32 release"),
        ("hidden_act", config.get("hidden_act", "silu") != "silu", 'Llama\'s MLP uses "silu"'),
        ("attention_bias", bool(config.get("attention_bias")), "Llamas with biases are not supported; use false"),
        ("mlp_bias", bool(config.get("mlp_bias")), "Llamas with biases are not supported; use false"),
    )
    for key, wrong, fix in refused:
        if wrong:
            value = json.dumps(config.get(key))
            raise UserError(f"{path}: {key} = {value[:60]}: {fix}")


def _fields(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields under our names, with transformers' defaults for missing ones."""
    values: dict[str, Any] = {}
    default = FAMILIES[config["model_type"]].defaults
    for theirs, ours in _FIELDS.items():
        if theirs in config:
            values[ours] = config[theirs] if theirs in _FRACTIONS else whole(config[theirs])
        elif theirs in default:
            values[ours] = default[theirs]
        elif theirs not in _OPTIONAL:
            raise UserError(f"{path}: {theirs} is missing; every Llama's config.json has it")
    if values.get("num_query_groups") is None:
        values["num_query_groups"] = values["num_attention_heads"]
    return values


def _dtype(config: dict[str, Any]) -> str:
    """The dtype under either name, the newer first, without torch's prefix."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(dtype).removeprefix("torch.")


def _first_problem(error: ValidationError) -> str:
    """pydantic's first error, with config.json's names, in one line."""
    theirs = {ours: name for name, ours in _FIELDS.items()} | {"window_size": "sliding_window"}
    problem = error.errors()[0]
    where = ".".join(theirs.get(str(part), str(part)) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where} = {json.dumps(problem['input'], default=str)[:60]}: {message}"
