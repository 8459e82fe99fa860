"""Refuses text that spells an added token: a turn whose text spells `<|im_end|>` would end there.

A tokenizer matches its added tokens before anything else, whether they are special or not, named (`eos_token`) or not.
They are therefore refused in the text of a conversation:

    special                                <|im_end|>, <|reserved_special_token_5|>   refused in every text
    merely added, written by the template  <｜User｜>                                 refused in every text
    merely added, with punctuation         <think>, <tool_call>                       refused, except in the assistant's
                                                                                      text: an answer may call a tool
    merely added, without punctuation      COVID, runs of blanks                      ordinary text

`tokenizers` itself finds the tokens that a text spells, because normalization matters: under NFKC ＜tool＞ is <tool>.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, models

from megalong.sft.formats import BadSampleError, Conversation

ORDINARY = "\ufdd0"  # a noncharacter, so not a token


class AddedTokens:
    """The added tokens of a tokenizer. `named` are those that its settings name; they count as special."""

    def __init__(self, tokenizer: Tokenizer, named: Iterable[str]) -> None:
        added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
        self._special = {token.content for token in added if token.special} | set(named)
        self._control: set[str] = set()
        # Only the rules for added tokens: to this model all other text is one unknown word.
        self._finder = Tokenizer(models.WordLevel({ORDINARY: 0}, unk_token=ORDINARY))
        self._finder.normalizer = tokenizer.normalizer
        for token in added:
            self._finder.add_tokens([token])
        as_written = tokenizer.normalizer is None or not any(token.normalized for token in added)
        self._first = {token.content[:1] for token in added if not token.content.isspace()} if as_written else None

    @property
    def closing(self) -> tuple[str, ...]:
        """The tokens that can end a turn, sorted."""
        return tuple(sorted(self._special | self._control))

    def find_control_tokens(self, prompt: str, answered: str) -> None:
        """Find the tokens that the template writes: those of a plain prompt that are also there with an answer."""
        self._control = set(self.spelled(prompt)) & set(self.spelled(answered))

    def spelled(self, text: str) -> list[str]:
        """The added tokens that `text` turns into, in its order."""
        if self._first is not None and not any(character in text for character in self._first):
            return []  # at most runs of blanks; saves a call that takes as long as tokenizing
        found = self._finder.encode(text, add_special_tokens=False)
        return [token for token, id in zip(found.tokens, found.ids, strict=True) if id != 0]

    def refuse(self, conversation: Conversation) -> None:
        """Refuse a conversation with text that would turn into one of them.

        Raises:
            BadSampleError: there is such text. The message names its role and the token.
        """
        for what, value in vars(conversation).items():
            if what == "messages":
                for message in value:
                    fields = [inner for key, inner in message.items() if key != "role"]
                    role = message["role"]
                    self._refuse(f"a turn of role {role} spells", fields, answers=role == "assistant")
            else:
                self._refuse(f"{what} spell", value, answers=False)

    def _refuse(self, who: str, value: Any, answers: bool) -> None:
        for text in texts(value):
            for token in self.spelled(text):
                if self._is_refused(token, answers):
                    raise BadSampleError("malformed", f"{who} the token {token!r}")

    def _is_refused(self, token: str, answers: bool) -> bool:
        marks = not answers and any(character in string.punctuation for character in token)
        return token in self._special or token in self._control or marks


def texts(value: Any) -> Iterator[str]:
    """Every text inside JSON lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts(inner)
