"""Convert RoPE settings to and from a Hugging Face `config.json`, in both of its formats.

transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 reads `rope_parameters`, which contains the base,
and each ignores or drops the other's. An export writes both:

    {"rope_theta": 5e5, "max_position_embeddings": 1048576,
     "rope_scaling":    {"rope_type": "yarn", "type": "yarn", "factor": 128.0, ...},
     "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 128.0, ...}}

Versions also disagree on the source of the factor: 4.51 to 4.55 replace a yarn `factor` by `max_position_embeddings /
original_max_position_embeddings`. So the export of a model trained with yarn writes `max_position_embeddings = factor *
original`, and every version finds the same factor. Other types' factors are read as written, with the model's own
length: Llama 3.1 has 131072 = 16 * 8192 at factor 8, Llama 3.2 the same at factor 32. (A model that is exported
unchanged keeps its original fields, yarn or not: `megalong.hf.config`.)

YaRN with its ramp over rotations does not exist in transformers. Without a temperature (`attention_factor: 1.0`) it
equals llama3's scaling and is exported as that; with one it cannot be exported, and the export says so.

ntk does not exist in transformers either (`dynamic` changes with the length of the input). It is exported as unscaled
RoPE with the changed base, which is equivalent.
"""

import json
from typing import Any

from pydantic import ValidationError

from megalong.config.rope import RopeSettings
from megalong.errors import UserError
from megalong.rope.scaling import ntk_theta, temperature

FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_DEFAULT_THETA = 10000.0  # transformers' default if a Llama's config.json has no base


def to_hf(rope: RopeSettings, max_position_embeddings: int, head_dim: int) -> dict[str, Any]:
    """The fields of `config.json` that `rope` decides, for every version of transformers.

    `max_position_embeddings` is the model's own; yarn's is computed (see above). `head_dim` converts ntk to a base.
    `from_hf` reads them back as `rope`, except that ntk returns as none with the changed base.
    """
    if rope.type == "ntk":
        rope = RopeSettings(rope_theta=ntk_theta(rope, head_dim))
    if rope.ramp == "rotations":
        rope = _as_llama3(rope)
    scaling = {key: getattr(rope, key) for key in FIELDS[rope.type] if not _left_out(rope, key)}
    name = "default" if rope.type == "none" else rope.type
    return {
        "max_position_embeddings": _longest(rope, max_position_embeddings),
        "rope_theta": rope.rope_theta,
        "rope_scaling": {"rope_type": name, "type": name, **scaling} if scaling else None,
        "rope_parameters": {"rope_type": name, "rope_theta": rope.rope_theta, **scaling},
    }


def from_hf(config: dict[str, Any]) -> RopeSettings:
    """The settings in a parsed `config.json` of either format, with `rope_theta` filled in.

    If both formats are present, `rope_scaling` applies, as in transformers 5. Raises `UserError` for unsupported
    scaling (dynamic, longrope, per-layer settings, partial rotation) and for invalid values.
    """
    scaling, five = _section(config, "rope_scaling"), _section(config, "rope_parameters")
    parameters = scaling or five
    name = _supported_type(config, parameters)
    theta = _first(parameters.get("rope_theta"), config.get("rope_theta"), five.get("rope_theta"), _DEFAULT_THETA)
    values: dict[str, Any] = {"type": name, "rope_theta": theta}
    for key in FIELDS[name]:
        if parameters.get(key) is not None:
            values[key] = parameters[key]
    if "original_max_position_embeddings" in FIELDS[name]:
        values["original_max_position_embeddings"] = _original_length(config, parameters)
        values.setdefault("factor", _implied_factor(config, values["original_max_position_embeddings"]))
    try:
        return RopeSettings(**values)
    except ValidationError as error:
        report = error.errors()[0]
        key = ".".join(("rope_parameters", *(str(part) for part in report["loc"] if part in RopeSettings.model_fields)))
        raise UserError(f"config.json: {key}: {report['msg']}, not {report['input']!r}") from None


def _as_llama3(rope: RopeSettings) -> RopeSettings:
    if temperature(rope) != 1.0:
        raise UserError(
            f"rope.ramp: rotations with a temperature of {temperature(rope):.4g} cannot be written to config.json; "
            "train with ramp: dimensions, or with attention_factor: 1.0, which is exported as llama3"
        )
    return RopeSettings(
        type="llama3",
        rope_theta=rope.rope_theta,
        factor=rope.factor,
        original_max_position_embeddings=rope.original_max_position_embeddings,
        low_freq_factor=rope.beta_slow,
        high_freq_factor=rope.beta_fast,
    )


def _left_out(rope: RopeSettings, key: str) -> bool:
    """Unset values are left out, and a default `truncate`, about which older versions warn."""
    return getattr(rope, key) is None or (key == "truncate" and rope.truncate)


def _longest(rope: RopeSettings, max_position_embeddings: int) -> int:
    if rope.type != "yarn" or rope.original_max_position_embeddings is None:
        return max_position_embeddings
    return round(rope.factor * rope.original_max_position_embeddings)


def _supported_type(config: dict[str, Any], parameters: dict[str, Any]) -> str:
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UserError("config.json: rope_parameters differ from layer to layer; only models with one setting load")
    fraction = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if fraction != 1.0:
        raise UserError(f"config.json: partial_rotary_factor: {fraction} is not supported; only whole heads rotate")
    name = "none" if name == "default" else name
    if name not in FIELDS:
        raise UserError(
            f"config.json: rope_type: {name!r} is not supported; "
            f"a model must use one of default, {', '.join(key for key in FIELDS if key != 'none')}"
        )
    return name


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json: {key} = {json.dumps(value)[:60]}: not a table of settings; write one, or null")
    return value or {}


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _original_length(config: dict[str, Any], parameters: dict[str, Any]) -> Any:
    """In transformers' order: beside the parameters, among them, else the model's whole length."""
    key = "original_max_position_embeddings"
    return _first(config.get(key), parameters.get(key), config.get("max_position_embeddings"))


def _implied_factor(config: dict[str, Any], original: Any) -> float:
    """The factor from two lengths, if none is written; 1 if a length is invalid, which is reported elsewhere."""
    longest = config.get("max_position_embeddings")
    known = all(isinstance(value, int | float) and value > 0 for value in (longest, original))
    return float(longest / original) if known else 1.0
