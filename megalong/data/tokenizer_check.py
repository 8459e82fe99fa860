"""Whether datasets were made with the tokenizer of the model that reads them, asked before a run reads one token.

Ids of another tokenizer are in range as often as not: a model then trains on noise, at a loss of seven instead of two,
and nothing else shows it. What a dataset was made with stands in its sidecar, what the model has in its folder; two
tokenizers that give the same ids are one here (`token_ids`). What stands between documents may be a special token,
which that leaves out: it is looked up in both.
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
class Made:
    """What a check says of a dataset: where its ids come from.

    Attributes:
        name: what messages call it, such as `data.mixture: books`.
        tokenizer: what its sidecar records, None where it does not.
        separator: `text` and `ids` between its documents, None without any.
    """

    name: str
    tokenizer: Mapping[str, Any] | None
    separator: Mapping[str, Any] | None = None


def check_tokenizers(made: Iterable[Made], folder: Path | None, mend: str, allowed: bool = False) -> list[str]:
    """Hold each dataset's tokenizer against that of the model; what is not known, or let through, a line each.

    Args:
        folder: of the model's tokenizer, None where the model brings none.
        mend: what lets another tokenizer through.
        allowed: it was written.

    Raises:
        UserError: a dataset was made with another tokenizer, and that is not `allowed`.
    """
    found: list[str] = []
    model = _open(folder)
    for one in made:
        if one.tokenizer is None or model is None:
            found.append(f"{one.name}: {_unknown(one, folder)}, so nothing shows that its ids are the model's")
        elif wrong := _difference(one, model):
            if not allowed:
                raise UserError(f"{one.name}: {wrong}; use the model's own, or, if its ids do fit, {mend}")
            found.append(f"{one.name}: {wrong}; let through by {mend}")
    return found


def _open(folder: Path | None) -> TextTokenizer | None:
    """The tokenizer in `folder`; None where there is none, or none that can be read, which whoever needs it tells."""
    if folder is None or not (folder / FILE).is_file():
        return None
    from megalong.data.tokenizer import TextTokenizer  # imports `tokenizers`, which opening a dataset does without

    try:
        return TextTokenizer(folder)
    except (UserError, OSError):
        return None


def _unknown(one: Made, folder: Path | None) -> str:
    if one.tokenizer is None:
        return "it does not say which tokenizer it was made with"
    lacks = f"{folder} holds no {FILE}" if folder is not None else "the model brings no tokenizer"
    return f"it was made with {_named(one.tokenizer)}, and {lacks} to compare"


def _difference(one: Made, model: TextTokenizer) -> str | None:
    """In what way a dataset's ids are not the model's; None where they are."""
    assert one.tokenizer is not None
    ours, theirs = _named(one.tokenizer), _named(model.described())
    same = same_ids(one.tokenizer, model.described())
    if same is None:
        return f"its tokenizer {ours} is gone and was not the model's file {theirs}"
    if not same:
        return f"its tokenizer {ours} gives other ids than the model's {theirs}"
    separator = one.separator or {}
    if not separator.get("ids") or one.tokenizer.get("sha256") == model.sha256:
        return None
    text, ids = str(separator.get("text")), list(separator["ids"])
    if [model.spelling(id) for id in ids] == [text] or _ids_of(text, model) == ids:
        return None
    return (
        f"its separator {text!r} is {ids} by its tokenizer {ours}, and {_ids_of(text, model)} by the model's {theirs}"
    )


def _ids_of(text: str, tokenizer: TextTokenizer) -> list[int]:
    added = tokenizer.added_id(text)
    return tokenizer.encode(text) if added is None else [added]


def _named(tokenizer: Mapping[str, Any]) -> str:
    where = f" ({tokenizer['path']})" if tokenizer.get("path") else ""
    return f"{str(tokenizer.get('name'))!r}{where}"
