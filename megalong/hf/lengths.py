"""Every length limit in a Hugging Face folder besides `max_position_embeddings`.

An extended model is useless if its files still contain the old limit: `generate` raises on a prompt longer than
`max_length`; servers use the smallest length in config.json, under any family's name for it, and cap requests at the
tokenizer's. Each limit below the new length is raised to it; none is added. Limits of new tokens (`max_new_tokens`) and
windows are not the model's length and stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalong.config.rope import whole
from megalong.hf.config import read_json

# `max_length` belongs to generation, but config.json may contain it too; servers such as vLLM read the others.
_OF_CONFIG = (
    "max_length",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "model_max_length",
    "n_positions",
    "seq_len",
    "seq_length",
)
_OF_FILES = {"generation_config.json": ("max_length",), "tokenizer_config.json": ("model_max_length", "max_len")}
_TOKENIZER = "tokenizer.json"


def raise_lengths(config: dict[str, Any], assets: Path, length: int) -> None:
    """Raise the limits of a folder to `length` tokens: `config` is its config.json, `assets` has its other files."""
    _raise(config, _OF_CONFIG, length)
    for name, keys in _OF_FILES.items():
        settings = read_json(assets / name) if (assets / name).is_file() else {}
        if _raise(settings, keys, length):
            _write(assets / name, settings)
    _raise_truncation(assets / _TOKENIZER, length)


def _raise_truncation(path: Path, length: int) -> None:
    """Raise the truncation of tokenizer.json, which applies if it is used without transformers."""
    if not path.is_file():
        return
    tokenizer = read_json(path)
    truncation = tokenizer.get("truncation")
    if isinstance(truncation, dict) and _raise(truncation, ("max_length",), length):
        _write(path, tokenizer)


def _raise(settings: dict[str, Any], keys: tuple[str, ...], length: int) -> bool:
    """Raise the lengths below `length`. Returns whether there were any."""
    low = [key for key in keys if type(whole(settings.get(key))) is int and settings[key] < length]
    settings.update(dict.fromkeys(low, length))
    return bool(low)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
