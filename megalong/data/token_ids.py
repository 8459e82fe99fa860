"""Whether two tokenizers give the same IDs, so that a dataset made with one can train a model with the other.

A dataset's sidecar stores two fingerprints of its tokenizer: `sha256` of the whole tokenizer.json, and `ids` of only
what decides IDs. If the first differ, the second are compared. `ids` covers

    normalizer, pre-tokenizer      as the installed `tokenizers` serializes them
    vocabulary, merges, scores     independent of how the file spells them, without unset fields
    added tokens that text matches those that are not special: spelling, ID, matching rules

and nothing else. Chat template, truncation, padding, post-processor and decoder do not change the IDs of a text, nor do
special tokens, which no text turns into. The tokenizer of an instruction-tuned model, or one that `transformers` saved
again, therefore counts as that of its base model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

FILE = "tokenizer.json"
# Defaults of model fields in `tokenizers`. A missing field without a default here counts as unset.
_DEFAULTS = {"max_input_chars_per_word": 100}
_MATCHING = ("content", "id", "single_word", "lstrip", "rstrip", "normalized")


def ids_fingerprint(content: bytes) -> str | None:
    """Digest of what decides IDs in a tokenizer.json; None if it cannot be read."""
    try:
        whole = orjson.loads(content)
        model = dict(whole["model"])
        added = [token for token in whole.get("added_tokens") or [] if not token.get("special")]
        matched = sorted(([token.get(name) for name in _MATCHING] for token in added), key=lambda one: str(one[1]))
        parts = [_outside(whole), matched, _model(model)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _outside(whole: Mapping[str, Any]) -> Any:
    """Normalizer and pre-tokenizer, as this version of `tokenizers` serializes them; others may differ."""
    from tokenizers import Tokenizer  # slow to import

    parts = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer")}
    empty: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        **parts,
    }
    try:
        serialized = json.loads(Tokenizer.from_str(json.dumps(empty)).to_str())
    except Exception:  # `tokenizers` raises bare Exception for whatever it cannot read
        return parts
    return [_canonical(serialized[name]) for name in parts]


def _canonical(part: Any) -> Any:
    """`part` without fields that only change offsets; a sequence of one element becomes that element."""
    if not isinstance(part, dict):
        return part
    for name in ("pretokenizers", "normalizers"):
        if isinstance(part.get(name), list):
            inner = [_canonical(one) for one in part[name]]
            return inner[0] if len(inner) == 1 else {**part, name: inner}
    return {name: value for name, value in part.items() if name != "trim_offsets"}


def _model(model: dict[str, Any]) -> dict[str, Any]:
    """The model in one spelling: files write merges as one string or as two, and unset fields as null or not at all."""
    merges, vocab = model.pop("merges", None), model.pop("vocab")
    model.setdefault("type", "BPE" if merges is not None else None)
    found = {name: value for name, value in model.items() if _set(name, value)}
    if merges is not None:
        found["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if isinstance(vocab, list):  # Unigram: scores, whose last digits change when `tokenizers` saves them again
        vocab = [[token, float(np.float32(score))] for token, score in vocab]
    return {**found, "vocab": vocab}


def _set(name: str, value: Any) -> bool:
    """Whether a field of the model means more than its absence; an ID of 0 does."""
    if type(value) is int and name != "dropout":
        return value != _DEFAULTS.get(name)
    return bool(value)


def same_ids(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool | None:
    """Whether two tokenizers, as sidecars record them, give the same IDs; None if that can no longer be found out."""
    if first.get("sha256") is not None and first["sha256"] == second.get("sha256"):
        return True
    ours, theirs = _ids(first), _ids(second)
    return None if ours is None or theirs is None else ours == theirs


def _ids(made_with: Mapping[str, Any]) -> str | None:
    """`ids` of a sidecar. Earlier versions did not record it; it is then computed if the tokenizer is still there."""
    if made_with.get("ids") is not None:
        return str(made_with["ids"])
    file = Path(str(made_with.get("path", ""))) / FILE
    try:
        content = file.read_bytes()
    except OSError:
        return None
    return ids_fingerprint(content) if hashlib.sha256(content).hexdigest() == made_with.get("sha256") else None
