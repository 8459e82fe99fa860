"""Text to IDs with a Hugging Face `tokenizer.json`, through the `tokenizers` library alone (`transformers` is slow to
import and is not needed).

A document is only its text:
- No begin or end token is added; documents are separated by the dataset's separator.
- Text never turns into a special token. A web page that spells "<|end_of_text|>" is encoded as those characters, as the
  reference tokenizer of Llama 3 does. Otherwise any page could end a document or open a chat turn. Added tokens that
  are not special ("<tool>") are matched as usual.
- Truncation and padding settings of a tokenizer.json are switched off: they would silently cut documents.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megalong.data.memory import trim_heap
from megalong.data.token_ids import ids_fingerprint
from megalong.errors import UserError
from megalong.runtime.files import refuse_unreadable

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


class TextTokenizer:
    """The tokenizer of a Hugging Face folder (or of a tokenizer.json itself).

    Only the head of the file is parsed until an ID is needed: a vocabulary of 128,000 takes a quarter second.

    Attributes:
        file: the tokenizer.json; name: the folder's name; path: the folder, absolute; sha256: the file's fingerprint.
        matched: spellings of added tokens that are not special; text that contains one turns into that token.
        highest_added_id: of all added tokens, special ones included; -1 without any.

    Raises:
        UserError: the folder or its tokenizer.json is missing or unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = _tokenizer_file(Path(path))
        refuse_unreadable(self.file, "--tokenizer: ", again="fetch it again")
        content = self.file.read_bytes()
        self.path = str(self.file.parent.resolve())
        self.name = self.file.parent.resolve().name
        self.sha256 = hashlib.sha256(content).hexdigest()
        added = added_tokens(content)
        if added is None:  # not laid out as `tokenizers` writes it: let the library parse it
            added = json.loads(self._tokenizer.to_str())["added_tokens"]
        head = _head(content)
        self._normalizes = head["normalizer"] is not None if head is not None and "normalizer" in head else None
        self._added = {str(token["content"]): int(token["id"]) for token in added}
        self.highest_added_id = max(self._added.values(), default=-1)
        self.matched = [str(token["content"]) for token in added if not token["special"]]

    @cached_property
    def vocabulary_size(self) -> int:
        """Highest ID + 1, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def normalizes(self) -> bool:
        """Whether text is normalized before tokens are matched (lower case, NFKC)."""
        return self._tokenizer.normalizer is not None if self._normalizes is None else self._normalizes

    @cached_property
    def eos_id(self) -> int | None:
        """ID of the end token, None if the folder names none."""
        return self._named_id("eos_token")

    def described(self) -> dict[str, str]:
        """What a sidecar records of it, without `ids`, which takes a moment to compute."""
        return {"name": self.name, "path": self.path, "sha256": self.sha256}

    @cached_property
    def ids(self) -> str | None:
        """Fingerprint of only what decides IDs (see token_ids.py)."""
        return ids_fingerprint(self.file.read_bytes())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return _loaded(self.file, self.file.read_bytes())

    def encode(self, text: str) -> list[int]:
        """IDs of the text, without begin or end token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """IDs of each text, as `encode` gives them."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def added_id(self, text: str) -> int | None:
        """ID of the special or added token spelled `text`, None if it is ordinary text."""
        return self._added.get(text)

    def spelling(self, id: int) -> str:
        """The spelling of one token of the vocabulary."""
        return next((text for text, added in self._added.items() if added == id), None) or str(
            self._tokenizer.id_to_token(id)
        )

    def _named_id(self, name: str) -> int | None:
        """The ID of `name` ("eos_token") in the first settings file that gives it, by spelling or by number."""
        for file in SETTINGS:
            settings = _settings(Path(self.path) / file)
            token = settings.get(name)
            spelled = token.get("content") if isinstance(token, dict) else token
            if isinstance(spelled, str):
                id = self._added.get(
                    spelled, self._tokenizer.token_to_id(spelled) if spelled not in self._added else None
                )
                if id is not None:
                    return int(id)
            number = settings.get(f"{name}_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int):
                return number
        return None


def _tokenizer_file(path: Path) -> Path:
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.is_dir():
        raise UserError(f"--tokenizer: the folder {path} does not exist; give a folder that contains tokenizer.json")
    if not os.path.lexists(path / "tokenizer.json"):
        raise UserError(
            f"--tokenizer: {path} contains no tokenizer.json; write it once with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    return path / "tokenizer.json"


def added_tokens(content: bytes) -> list[dict[str, Any]] | None:
    """The added tokens of a tokenizer.json, None if it is not laid out as `tokenizers` writes it."""
    span = added_tokens_span(content)
    return None if span is None else list(json.loads(content[span]))


def added_tokens_span(content: bytes) -> slice | None:
    """Where the list of added tokens is in a tokenizer.json.

    Most of the file is megabytes of vocabulary that need no parsing: the list comes before it. The list is at the top
    level if what precedes it becomes an object once a brace is added.
    """
    head, name, rest = content.partition(b'"added_tokens":')
    try:
        json.loads(head.rstrip().removesuffix(b",") + b"}")
        start = len(head) + len(name)
        text = rest[: rest.index(b'"model"')].decode()
        blank = len(text) - len(text.lstrip())
        tokens, end = json.JSONDecoder().raw_decode(text, blank)
    except ValueError:
        return None
    return slice(start, start + len(text[:end].encode())) if isinstance(tokens, list) else None


def _head(content: bytes) -> dict[str, Any] | None:
    """The part of a tokenizer.json before its vocabulary, None if it is laid out differently."""
    try:
        head = json.loads(content.partition(b'"model":')[0].rstrip().removesuffix(b",") + b"}")
    except ValueError:
        return None
    return head if isinstance(head, dict) else None


def _loaded(file: Path, content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
        reason = " ".join(str(error).split())
        raise UserError(f"--tokenizer: {file} is not readable by `tokenizers` ({reason}); fetch it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    trim_heap()
    return tokenizer


def _settings(file: Path) -> dict[str, Any]:
    if not os.path.lexists(file):
        return {}
    refuse_unreadable(file, "--tokenizer: ", again="fetch it again")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--tokenizer: {file} is not valid JSON ({error}); fetch it again") from None
    return settings if isinstance(settings, dict) else {}
