"""Added tokens that a text spells: text of a turn that spells `<|im_end|>` would end the turn.

A tokenizer's added tokens are looked for in a text before anything else, whether they are special or not, named
(`eos_token`) or not. So each of them is refused where it gets in with somebody's text:

    special                                <|im_end|>, <|reserved_special_token_5|>   refused in every text
    merely added, written by the template  <｜User｜>                                 refused in every text
    merely added, with punctuation         <think>, <tool_call>                       refused, save in the assistant's
                                                                                      text: an answer may call a tool
    merely added, without punctuation      COVID, runs of blanks                      words like others

Which ones a text spells is asked of `tokenizers` itself, because normalization counts: under NFKC ＜tool＞ is <tool>.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, models

from megalong.sft.formats import BadSampleError, Conversation

ORDINARY = "\ufdd0"  # no character, so no token either


class AddedTokens:
    """The added tokens of a tokenizer; `named` are those its settings name, which are special whatever it says."""

    def __init__(self, tokenizer: Tokenizer, named: Iterable[str]) -> None:
        added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
        self._special = {token.content for token in added if token.special} | set(named)
        self._control: set[str] = set()
        # The rules for added tokens without the rest: whatever spells none is one unknown word to this model.
        self._finder = Tokenizer(models.WordLevel({ORDINARY: 0}, unk_token=ORDINARY))
        self._finder.normalizer = tokenizer.normalizer
        for token in added:
            self._finder.add_tokens([token])
        as_written = tokenizer.normalizer is None or not any(token.normalized for token in added)
        self._first = {token.content[:1] for token in added if not token.content.isspace()} if as_written else None

    @property
    def closing(self) -> tuple[str, ...]:
        """Those that can end a turn, sorted."""
        return tuple(sorted(self._special | self._control))

    def written_by_template(self, prompt: str, answered: str) -> None:
        """Learn the template's own tokens: those of a plain prompt that are still there when it has been answered."""
        self._control = set(self.spelled(prompt)) & set(self.spelled(answered))

    def spelled(self, text: str) -> list[str]:
        """The added tokens that `text` turns into, in its order."""
        if self._first is not None and not any(character in text for character in self._first):
            return []  # nothing but runs of blanks; asking takes as long as tokenizing
        found = self._finder.encode(text, add_special_tokens=False)
        return [token for token, id in zip(found.tokens, found.ids, strict=True) if id != 0]

    def refuse(self, conversation: Conversation) -> None:
        """Refuse a conversation with text that would turn into one of them.

        Raises:
            BadSampleError: naming whose text it is, and the token.
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
                if self._acts(token, answers):
                    raise BadSampleError("malformed", f"{who} the token {token!r}")

    def _acts(self, token: str, answers: bool) -> bool:
        marks = not answers and any(character in string.punctuation for character in token)
        return token in self._special or token in self._control or marks


def texts(value: Any) -> Iterator[str]:
    """Every text inside of JSON's lists and objects, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts(inner)
