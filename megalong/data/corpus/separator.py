"""The separator between documents, or before each of them.

    --separator "<s>"    a special or added token of the tokenizer, by its spelling: its ID
    --separator $'\\n\\n'  any other text: the IDs of that text
    --append-eod         the tokenizer's end token; the flag is Megatron-LM's
    (none of them)       no separator

It is stored with every document, as its last tokens or (`--separator-position before`) its first. It is therefore there
in whatever order a sampler puts documents. Documents of 3, 0 and 2 tokens with the separator S:

    between  a a a S | | b b S        before  S a a a | | S b b

An empty document gets no separator and stays empty, as Megatron-LM's own tool writes it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError

POSITIONS = ("between", "before")


@dataclass(frozen=True)
class Separator:
    """The text that the user gave, its IDs, and its position."""

    text: str
    ids: list[int]
    position: str = POSITIONS[0]

    def described(self) -> dict[str, Any]:
        """Its description in the sidecar."""
        return {"text": self.text, "ids": self.ids, "position": self.position}


def find_separator(
    tokenizer: TextTokenizer, append_eod: bool, separator: str | None, position: str = POSITIONS[0]
) -> Separator | None:
    """The separator that the flags ask for, or None.

    Raises:
        UserError: flags contradict each other, the separator is empty, or the tokenizer has no end token.
    """
    if append_eod and separator is not None:
        raise UserError(f"--append-eod and --separator {separator!r} both end a document; give one of them")
    if position == "before" and separator is None:
        raise UserError("--separator-position before: there is nothing to put there; name it with --separator")
    if append_eod:
        if tokenizer.eos_id is None:
            raise UserError(
                f"--append-eod: {tokenizer.path} names no end token; name one with --separator, or set "
                "eos_token in its tokenizer_config.json"
            )
        return Separator(tokenizer.spelling(tokenizer.eos_id), [tokenizer.eos_id])
    if separator is None:
        return None
    added = tokenizer.added_id(separator)
    ids = tokenizer.encode(separator) if added is None else [added]
    if not ids:
        raise UserError(f"--separator: {separator!r} has no tokens; leave the flag out to have none")
    return Separator(separator, ids, position)


def with_separator(
    tokens: np.ndarray, lengths: np.ndarray, separator: Separator | None, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens as `dtype`, lengths) with the separator added to each non-empty document.

    Args:
        tokens: IDs [sum of lengths], documents end to end; lengths: int64 [documents].
    """
    if separator is None:
        return tokens.astype(dtype), lengths
    size = len(separator.ids)
    longer = lengths + size * (lengths > 0)
    ends = np.cumsum(longer)[lengths > 0]
    first = ends - size if separator.position == "between" else ends - longer[lengths > 0]
    out = np.empty(int(longer.sum()), dtype)
    own = np.ones(len(out), bool)
    for offset, id in enumerate(separator.ids):
        out[first + offset] = id
        own[first + offset] = False
    out[own] = tokens
    return out, longer
