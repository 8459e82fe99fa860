"""Text with special tokens to IDs and back, by tokenizer.json alone.

`transformers` rebuilds some tokenizers from their vocabulary (GPT2Tokenizer, LlamaTokenizer) with the rules of the
class instead of the file. It then splits text differently from `data preprocess` and from the model's training. We
therefore use its rendered text (chat templates) but not its IDs. Tokens that its settings name count as special if they
are in the vocabulary, even if tokenizer.json does not add them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megalong.errors import UserError
from megalong.runtime.files import refuse_unreadable_json


def open_tokenizer(folder: str | Path, key: str) -> Any:
    """transformers' tokenizer of a folder, for its template and names; messages begin with `key`.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    refuse_unreadable_json(Path(folder), f"{key}: ")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises bare Exception; settings of wrong types raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: the tokenizer of {folder} cannot be read ({reason}); fetch it again") from None


class Words:
    """Text to ids and back.

    Attributes:
        tokenizer: the `tokenizers` object.
        named: the special tokens that the settings name.
    """

    def __init__(self, folder: str | Path, named_by: Any) -> None:
        """`named_by` is transformers' tokenizer. Its own tokenizer.json is used if the folder has none."""
        file = Path(folder) / "tokenizer.json"
        content = file.read_text(encoding="utf-8") if file.is_file() else named_by.backend_tokenizer.to_str()
        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Even a post-processor that adds no token may trim white space from a token's offsets.
        self._post_processor, self.tokenizer.post_processor = self.tokenizer.post_processor, None
        self.named: list[str] = list(named_by.all_special_tokens)
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        for name in self.named:
            if name not in added and self.tokenizer.token_to_id(name) is not None:
                self.tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """IDs of a text that already contains its special tokens, and the span of characters of each."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def prompt(self, text: str) -> list[int]:
        """IDs of a text with the begin and end tokens of tokenizer.json's post-processor; settings are ignored."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return list(self._post_processor.process(found).ids if self._post_processor is not None else found.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def missing(self, text: str) -> str | None:
        """A named special token that `text` contains but the vocabulary does not."""
        return next((name for name in self.named if name in text and self.tokenizer.token_to_id(name) is None), None)
