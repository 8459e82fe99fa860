"""Checks before a run that its datasets were made with the tokenizer of the model.

IDs of another tokenizer are often in range. The model then trains on noise, at a loss of seven instead of two, and
nothing else shows it. A dataset's sidecar records its tokenizer; the model's is in the model's folder. Tokenizers that
give the same IDs count as one (token_ids.py). That comparison leaves out special tokens, and the separator between
documents may be one, so the separator is looked up in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalong.data.token_ids import FILE, same_ids
from megalong.errors import UserError

if TYPE_CHECKING:
    from megalong.data.tokenizer import TextTokenizer

ALLOW = "data.allow_other_tokenizer: true"


@dataclass(frozen=True)
class DatasetTokenizer:
    """What a dataset was made with.

    Attributes:
        name: its name in messages, such as `data.mixture: books`.
        tokenizer: the one its sidecar records, None if it records none.
        separator: `text` and `ids` between its documents, None without a separator.
    """

    name: str
    tokenizer: Mapping[str, Any] | None
    separator: Mapping[str, Any] | None = None


def check_tokenizers(
    made: Iterable[DatasetTokenizer], folder: Path | None, fix: str, allowed: bool = False
) -> list[str]:
    """Compare each dataset's tokenizer with the model's. Returns a line for each that is unknown or allowed to differ.

    Args:
        folder: of the model's tokenizer, None if the model has none.
        fix: the setting that allows another tokenizer, for messages.
        allowed: whether it is set.

    Raises:
        UserError: a dataset was made with another tokenizer, and that is not `allowed`.
    """
    found: list[str] = []
    model = _open(folder)
    for one in made:
        if one.tokenizer is None or model is None:
            found.append(f"{one.name}: {_unknown(one, folder)}, so its ids cannot be compared with the model's")
        elif wrong := _difference(one, model):
            if not allowed:
                raise UserError(f"{one.name}: {wrong}; use the model's own, or, if its ids do fit, {fix}")
            found.append(f"{one.name}: {wrong}; allowed by {fix}")
    return found


def _open(folder: Path | None) -> TextTokenizer | None:
    """The tokenizer in `folder`; None if it is missing or cannot be read, which the code that needs it reports."""
    if folder is None or not (folder / FILE).is_file():
        return None
    from megalong.data.tokenizer import TextTokenizer  # imports `tokenizers`, which opening a dataset does not need

    try:
        return TextTokenizer(folder)
    except (UserError, OSError):
        return None


def _unknown(one: DatasetTokenizer, folder: Path | None) -> str:
    if one.tokenizer is None:
        return "it does not say which tokenizer it was made with"
    lacks = f"{folder} contains no {FILE}" if folder is not None else "the model has no tokenizer"
    return f"it was made with {_named(one.tokenizer)}, and {lacks} to compare"


def _difference(one: DatasetTokenizer, model: TextTokenizer) -> str | None:
    """How a dataset's IDs differ from the model's; None if they do not."""
    assert one.tokenizer is not None
    ours, theirs = _named(one.tokenizer), _named(model.described())
    same = same_ids(one.tokenizer, model.described())
    if same is None:
        return f"its tokenizer {ours} is gone, and it was not the model's file {theirs}"
    if not same:
        return f"its tokenizer {ours} gives other ids than the model's {theirs}"
    separator = one.separator or {}
    if not separator.get("ids") or one.tokenizer.get("sha256") == model.sha256:
        return None
    text, ids = str(separator.get("text")), list(separator["ids"])
    if [model.spelling(id) for id in ids] == [text] or _ids_of(text, model) == ids:
        return None
    return (
        f"its separator {text!r} is {ids} in its tokenizer {ours}, but {_ids_of(text, model)} in the model's {theirs}"
    )


def _ids_of(text: str, tokenizer: TextTokenizer) -> list[int]:
    added = tokenizer.added_id(text)
    return tokenizer.encode(text) if added is None else [added]


def _named(tokenizer: Mapping[str, Any]) -> str:
    where = f" ({tokenizer['path']})" if tokenizer.get("path") else ""
    return f"{str(tokenizer.get('name'))!r}{where}"
