"""The tokenizer's own chat template: a conversation as the text and tokens the model is trained to expect.

transformers renders it (a sandboxed Jinja). Text that spells out one of the tokenizer's added tokens is refused
(spelled.py): it would be tokenized as the real one, and could end the turn or open another.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megalong.errors import UserError
from megalong.sft.formats import BadSampleError, Conversation, Message
from megalong.sft.marks import Span, has_marks, locate
from megalong.sft.spelled import AddedTokens
from megalong.sft.tool_calls import as_written

# What a template raises besides jinja's own errors where a turn has not the keys or types it is written for.
_REFUSALS = (TypeError, KeyError, ValueError, AttributeError)


class ChatTemplate:
    """The tokenizer and template of a folder.

    Attributes:
        tokenizer: transformers' fast tokenizer.
        marked: whether the template marks the assistant's tokens with `{% generation %}`.
        fingerprint: of vocabulary and template.

    Raises:
        UserError: the folder has no fast tokenizer, or that has no chat template.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        if not (Path(folder) / "tokenizer.json").is_file():
            raise UserError(f"sft.tokenizer: {folder} holds no tokenizer.json; write sft.tokenizer: DIR that has one")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"sft.tokenizer: {folder} cannot be read ({' '.join(str(error).split())})") from None
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            raise UserError(
                f"sft.tokenizer: {folder} has several chat templates ({', '.join(template)}); leave one, as its "
                "chat_template.jinja"
            )
        if not isinstance(template, str):
            raise UserError(
                f"sft.tokenizer: {folder} has no chat template; put a chat_template.jinja beside its tokenizer.json, "
                "or write sft.tokenizer: DIR of the instruction-tuned model"
            )
        self.marked = has_marks(template)
        self._check_syntax(folder)
        self._added = AddedTokens(self.tokenizer.backend_tokenizer, self.tokenizer.all_special_tokens)
        self._find_control()
        self._words = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._words.no_truncation()
        self._words.no_padding()
        self._words.post_processor = None  # one that adds no token here may still cut white space off a token's place
        closing = repr(self._added.closing).encode()
        content = (Path(folder) / "tokenizer.json").read_bytes() + template.encode() + closing
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def _check_syntax(self, folder: str | Path) -> None:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        try:
            self.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(
                f"sft.tokenizer: the chat template of {folder} is broken at line {error.lineno}: {error.message}; mend "
                "it"
            ) from None
        except (TemplateError, *_REFUSALS):
            pass  # it may refuse this conversation; those of the sources are told one by one

    def _find_control(self) -> None:
        """Learn which tokens the template writes itself, from the plainest conversation that it takes."""
        asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        for head in ([], [{"role": "system", "content": "."}]):
            with suppress(BadSampleError):
                turns = [*head, asked]
                self._added.written_by_template(self.text(turns, prompt=True), self.text([*turns, answer]))
                break

    def text(self, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt` up to where the assistant's next answer begins.

        Raises:
            BadSampleError: the template refuses it.
        """
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def with_calls(self, conversation: Conversation) -> Conversation:
        """The conversation with the arguments of calls in the form that the template writes right.

        Raises:
            BadSampleError: there is none, or the template refuses both.
        """
        try:
            messages = as_written(conversation.messages, lambda messages: self.text(messages, conversation.tools))
        except ValueError as error:
            raise BadSampleError("malformed", str(error)) from None
        return replace(conversation, messages=messages)

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text, and for each the characters it stands for, white space included."""
        found = self._words.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def marks(self, conversation: Conversation, text: str) -> list[Span]:
        """The stretches of `text`, in characters, that the template's `{% generation %}` marks.

        Raises:
            BadSampleError: the template refuses the conversation, or its marks cannot be followed.
        """

        def render(template: str) -> str:
            return str(self._apply(conversation.messages, conversation.tools, tokenize=False, chat_template=template))

        spans = locate(str(self.tokenizer.chat_template), text, render)
        if spans is None:
            raise BadSampleError(
                "malformed",
                "the chat template captures or changes what it marks with {% generation %}; mark the output",
            )
        return spans

    def refuse_added(self, conversation: Conversation) -> None:
        """Refuse text that would turn into an added token.

        Raises:
            BadSampleError: naming it.
        """
        self._added.refuse(conversation)

    def ends_with_special(self, text: str) -> bool:
        """Whether `text` ends with a special token or one the template writes around turns."""
        return text.endswith(self._added.closing)

    def _apply(self, messages: list[Message], tools: list[Any] | None, **how: Any) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except (TemplateError, *_REFUSALS) as error:
            raise BadSampleError("malformed", f"the chat template refuses it ({error})") from None
