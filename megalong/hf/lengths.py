"""Every place of a Hugging Face folder, beside `max_position_embeddings`, that says how much a model reads.

An extended model is no use behind a limit that its files still carry: `generate` raises on a prompt longer than
`max_length`, servers take the smallest length that config.json names under any of the names that families use, and cap
a request at the tokenizer's. Each limit below the new length is raised to it; none is added, and lengths of new tokens
(`max_new_tokens`) and windows are not the model's length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalong.config.rope import whole
from megalong.hf.config import read_json

# `max_length` is generation's, which config.json may hold too; the others are what vLLM and its kin look for.
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
    """Let the folder read `length` tokens: `config` is its config.json, `assets` holds its other files."""
    _raise(config, _OF_CONFIG, length)
    for name, keys in _OF_FILES.items():
        settings = read_json(assets / name) if (assets / name).is_file() else {}
        if _raise(settings, keys, length):
            _write(assets / name, settings)
    _raise_truncation(assets / _TOKENIZER, length)


def _raise_truncation(path: Path, length: int) -> None:
    """A tokenizer.json may cut texts by itself, for whoever reads it without transformers."""
    if not path.is_file():
        return
    tokenizer = read_json(path)
    truncation = tokenizer.get("truncation")
    if isinstance(truncation, dict) and _raise(truncation, ("max_length",), length):
        _write(path, tokenizer)


def _raise(settings: dict[str, Any], keys: tuple[str, ...], length: int) -> bool:
    """Raise what is a length and below; whether there was any."""
    low = [key for key in keys if type(whole(settings.get(key))) is int and settings[key] < length]
    settings.update(dict.fromkeys(low, length))
    return bool(low)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
