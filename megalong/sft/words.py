"""A tokenizer's own words: ids of text in which special tokens count, by tokenizer.json alone.

`transformers` builds some tokenizers anew from their vocabulary (GPT2Tokenizer, LlamaTokenizer), with the class's rules
in place of the file's: it then splits text otherwise than `data preprocess` did, and than the model learnt. So its text
is taken (chat templates) and not its ids. The names that its settings give tokens are taken as well: one that the
vocabulary has is special, also where tokenizer.json does not add it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megalong.errors import UserError
from megalong.runtime.files import refuse_unreadable_json


def open_tokenizer(folder: str | Path, asked: str) -> Any:
    """transformers' tokenizer of a folder, for its template and names; `asked` is how a message begins.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    refuse_unreadable_json(Path(folder), f"{asked}: ")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises bare Exception; settings of wrong types raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{asked}: the tokenizer of {folder} cannot be read ({reason}); fetch it again") from None


class Words:
    """Text to ids and back.

    Attributes:
        tokenizer: the `tokenizers` object.
        named: the special tokens that settings name.
    """

    def __init__(self, folder: str | Path, named_by: Any) -> None:
        """`named_by` is transformers' tokenizer; a folder without tokenizer.json has what that would save as one."""
        file = Path(folder) / "tokenizer.json"
        content = file.read_text(encoding="utf-8") if file.is_file() else named_by.backend_tokenizer.to_str()
        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # One that adds no token to a template's text may still cut white space off a token's place.
        self._post_processor, self.tokenizer.post_processor = self.tokenizer.post_processor, None
        self.named: list[str] = list(named_by.all_special_tokens)
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        for name in self.named:
            if name not in added and self.tokenizer.token_to_id(name) is not None:
                self.tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text that has its special tokens already, and the characters each stands for."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def prompt(self, text: str) -> list[int]:
        """Ids of a text with the begin and end tokens that tokenizer.json puts around one, whatever settings say."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return list(self._post_processor.process(found).ids if self._post_processor is not None else found.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens, as its tokens spell it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def missing(self, text: str) -> str | None:
        """A named special token that `text` spells and the vocabulary does not have."""
        return next((name for name in self.named if name in text and self.tokenizer.token_to_id(name) is None), None)
