"""Whether two tokenizers give the same ids, so that a dataset made with one can train a model that has the other.

A dataset's sidecar keeps two fingerprints of its tokenizer: `sha256` of the whole tokenizer.json, and `ids` of what
decides ids alone. Where the first differ, the second are compared. They cover

    normalizer, pre-tokenizer      as the installed `tokenizers` spells them
    vocabulary, merges, scores     whatever the file's spelling, unset fields left out
    added tokens that text matches those that are not special: spelling, id, how they are matched

and nothing else: chat template, truncation, padding, post-processor and decoder change no id of a text, nor do special
tokens, which text never turns into. So an instruction-tuned model's tokenizer, or one that `transformers` has saved
again, is its base's.
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
# What fields of the models of `tokenizers` mean where a file leaves them out; all others count as unset.
_DEFAULTS = {"max_input_chars_per_word": 100}
_MATCHING = ("content", "id", "single_word", "lstrip", "rstrip", "normalized")


def ids_fingerprint(content: bytes) -> str | None:
    """Digest of what decides ids in a tokenizer.json; None where it is not one that can be read."""
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
    """Normalizer and pre-tokenizer; a file of another version of `tokenizers` may spell the same ones otherwise."""
    from tokenizers import Tokenizer  # takes a moment to import

    parts = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer")}
    empty: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        **parts,
    }
    try:
        spelled = json.loads(Tokenizer.from_str(json.dumps(empty)).to_str())
    except Exception:  # `tokenizers` raises bare Exception for whatever it cannot read
        return parts
    return [_whole(spelled[name]) for name in parts]


def _whole(part: Any) -> Any:
    """Without what changes offsets only, and with a sequence of one as what it holds."""
    if not isinstance(part, dict):
        return part
    for name in ("pretokenizers", "normalizers"):
        if isinstance(part.get(name), list):
            inner = [_whole(one) for one in part[name]]
            return inner[0] if len(inner) == 1 else {**part, name: inner}
    return {name: value for name, value in part.items() if name != "trim_offsets"}


def _model(model: dict[str, Any]) -> dict[str, Any]:
    """The model without its spelling: merges are written as one text or as two, and what is unset or left out."""
    merges, vocab = model.pop("merges", None), model.pop("vocab")
    model.setdefault("type", "BPE" if merges is not None else None)
    found = {name: value for name, value in model.items() if _set(name, value)}
    if merges is not None:
        found["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if isinstance(vocab, list):  # of Unigram: scores, whose last digits change as `tokenizers` saves them again
        vocab = [[token, float(np.float32(score))] for token, score in vocab]
    return {**found, "vocab": vocab}


def _set(name: str, value: Any) -> bool:
    """Whether a field of the model says more than its absence; an id of 0 does."""
    if type(value) is int and name != "dropout":
        return value != _DEFAULTS.get(name)
    return bool(value)


def same_ids(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool | None:
    """Whether tokenizers, as sidecars record them, give the same ids; None where nothing shows it any more."""
    if first.get("sha256") is not None and first["sha256"] == second.get("sha256"):
        return True
    ours, theirs = _ids(first), _ids(second)
    return None if ours is None or theirs is None else ours == theirs


def _ids(made_with: Mapping[str, Any]) -> str | None:
    """`ids` of a sidecar; an earlier version's has none, but its tokenizer may still be where it was."""
    if made_with.get("ids") is not None:
        return str(made_with["ids"])
    file = Path(str(made_with.get("path", ""))) / FILE
    try:
        content = file.read_bytes()
    except OSError:
        return None
    return ids_fingerprint(content) if hashlib.sha256(content).hexdigest() == made_with.get("sha256") else None
