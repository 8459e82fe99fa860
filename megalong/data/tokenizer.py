"""Text to ids with a Hugging Face `tokenizer.json`, through the `tokenizers` library alone (`transformers` is slow to
import and is not needed).

A document is nothing but its text:
- no begin or end token is added; what stands between documents is the dataset's separator, stated once;
- text never turns into a special token. A web page that spells out "<|end_of_text|>" is encoded as those characters,
  as the reference tokenizer of Llama 3 does: otherwise any page could end a document or open a chat turn.
  Tokens that were added to the vocabulary without being special ("<tool>") are matched as usual.
Settings for truncation and padding that a tokenizer.json may carry are switched off: they would cut documents silently.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megalong.errors import UserError

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


class TextTokenizer:
    """The tokenizer of a Hugging Face folder (or of a tokenizer.json itself).

    Attributes:
        name: the folder's name; path: the folder, absolute; sha256: fingerprint of tokenizer.json.
        vocabulary_size: highest id + 1, added tokens included.
        bos_id, eos_id: ids of the begin and end tokens, None where the folder names none.

    Raises:
        UserError: the folder or its tokenizer.json is absent or unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        file = _tokenizer_file(Path(path))
        content = file.read_bytes()
        self.path = str(file.parent.resolve())
        self.name = file.parent.resolve().name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer = _loaded(file, content)
        self.vocabulary_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._added = {str(token.content): id for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; the same as `encode` on each."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def added_id(self, text: str) -> int | None:
        """Id of the special or added token spelled `text`, None where it is ordinary text."""
        return self._added.get(text)

    def spelling(self, id: int) -> str:
        """The spelling of one token of the vocabulary."""
        return str(self._tokenizer.id_to_token(id))

    def _named_id(self, name: str) -> int | None:
        """The id of `name` ("eos_token") by the first settings file that tells it, by spelling or by number."""
        for file in SETTINGS:
            settings = _settings(Path(self.path) / file)
            token = settings.get(name)
            spelled = token.get("content") if isinstance(token, dict) else token
            if isinstance(spelled, str) and (id := self._tokenizer.token_to_id(spelled)) is not None:
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
        raise UserError(f"--tokenizer: the folder {path} does not exist; give a folder that holds tokenizer.json")
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"--tokenizer: {path} holds no tokenizer.json; write it once with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    return path / "tokenizer.json"


def _loaded(file: Path, content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
        reason = " ".join(str(error).split())
        raise UserError(f"--tokenizer: {file} is not readable by `tokenizers` ({reason}); fetch it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--tokenizer: {file} is not valid JSON ({error}); fetch it again") from None
    return settings if isinstance(settings, dict) else {}
