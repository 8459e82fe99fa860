"""The tokenizer's own chat template: a conversation as the text and tokens that the model expects.

transformers renders it (a sandboxed Jinja). Text that spells one of the tokenizer's added tokens is refused
(spelled.py): it would be tokenized as that token, and could end the turn or begin another.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalong.errors import UserError
from megalong.sft.formats import BadSampleError, Conversation, Message
from megalong.sft.marks import Span, has_marks, locate
from megalong.sft.spelled import AddedTokens
from megalong.sft.tool_calls import as_written
from megalong.sft.words import Words, open_tokenizer


class ChatTemplate:
    """The tokenizer and template of a folder.

    Attributes:
        tokenizer: transformers' tokenizer, which renders the text; words: turns the text into IDs.
        marked: whether the template marks the assistant's tokens with `{% generation %}`.
        fingerprint: of vocabulary and template.

    Raises:
        UserError: the folder's tokenizer cannot be read, or has no chat template, several, or a broken one.
    """

    def __init__(self, folder: str | Path, key: str = "sft.tokenizer") -> None:
        """`key` is the key or flag that needs the template; messages begin with it."""
        self.tokenizer: Any = open_tokenizer(folder, key)
        template = _single_template(self.tokenizer.chat_template, folder, key)
        self.tokenizer.chat_template = template
        self.marked = has_marks(template)
        self._check_syntax(folder, key)
        self.words = Words(folder, self.tokenizer)
        self._added = AddedTokens(self.words.tokenizer, self.words.named)
        self._find_control_tokens()
        content = self.words.tokenizer.to_str() + template + repr(self._added.closing)
        self.fingerprint = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def _check_syntax(self, folder: str | Path, key: str) -> None:
        from jinja2.exceptions import TemplateSyntaxError

        try:
            self.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{key}: the chat template of {folder} is broken at line {error.lineno}: {one_line(error)}; fix it"
            ) from None
        except Exception:
            pass  # it may refuse this conversation; real ones that it refuses are reported one by one

    def _find_control_tokens(self) -> None:
        """Find the tokens that the template writes itself, with the simplest conversation that it accepts."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        for head in ([], [{"role": "system", "content": "."}]):
            with suppress(BadSampleError):
                turns = [*head, question]
                self._added.find_control_tokens(self.text(turns, prompt=True), self.text([*turns, answer]))
                break

    def text(self, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant's next answer begins.

        Raises:
            BadSampleError: the template refuses it.
        """
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def with_calls(self, conversation: Conversation) -> Conversation:
        """The conversation with the arguments of tool calls in the form that the template writes correctly.

        Raises:
            BadSampleError: the template writes neither form correctly, or refuses both.
        """
        try:
            messages = as_written(conversation.messages, lambda messages: self.text(messages, conversation.tools))
        except ValueError as error:
            raise BadSampleError("malformed", str(error)) from None
        return replace(conversation, messages=messages)

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """IDs of a rendered text, and the span of characters of each, white space included.

        Raises:
            BadSampleError: the template writes a special token that is not in the vocabulary.
        """
        missing = self.words.missing(text)
        if missing is not None:
            raise BadSampleError(
                "malformed", f"the chat template writes {missing!r}, which tokenizer.json does not have"
            )
        return self.words.encode(text)

    def marks(self, conversation: Conversation, text: str) -> list[Span]:
        """The spans of `text`, in characters, that the template marks with `{% generation %}`.

        Raises:
            BadSampleError: the template refuses the conversation, or its marks cannot be located.
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
            BadSampleError: there is such text.
        """
        self._added.refuse(conversation)

    def ends_with_special(self, text: str) -> bool:
        """Whether `text` ends with a special token or a token that the template writes around turns."""
        return text.endswith(self._added.closing)

    def _apply(self, messages: list[Message], tools: list[Any] | None, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except Exception as error:  # a template is foreign code and may raise anything
            raise BadSampleError("malformed", f"the chat template refuses it ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """An error's message in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _single_template(template: Any, folder: str | Path, key: str) -> str:
    """The template of a tokenizer that has exactly one; for `--chat` also one named `default` among several."""
    if isinstance(template, dict) and (len(template) == 1 or (key == "--chat" and "default" in template)):
        template = template.get("default", next(iter(template.values())))
    if isinstance(template, dict) and template:
        raise UserError(
            f"{key}: {folder} has several chat templates ({', '.join(map(str, template))}); keep one, as its "
            "chat_template.jinja"
        )
    if not isinstance(template, str) or not template:
        instead = "leave --chat out" if key == "--chat" else "write sft.tokenizer: DIR of the instruction-tuned model"
        raise UserError(
            f"{key}: {folder} has no chat template; put a chat_template.jinja beside its tokenizer.json, or {instead}"
        )
    return template
