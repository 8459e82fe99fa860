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

from megalong.errors import UserError
from megalong.sft.formats import BadSampleError, Conversation, Message
from megalong.sft.marks import Span, has_marks, locate
from megalong.sft.spelled import AddedTokens
from megalong.sft.tool_calls import as_written
from megalong.sft.words import Words, open_tokenizer


class ChatTemplate:
    """The tokenizer and template of a folder.

    Attributes:
        tokenizer: transformers' tokenizer, which renders the text; words: what makes ids of it.
        marked: whether the template marks the assistant's tokens with `{% generation %}`.
        fingerprint: of vocabulary and template.

    Raises:
        UserError: the folder's tokenizer cannot be read, or has no chat template, several, or a broken one.
    """

    def __init__(self, folder: str | Path, asked: str = "sft.tokenizer") -> None:
        """`asked` is how messages begin: the key or the flag that needs the template."""
        self.tokenizer: Any = open_tokenizer(folder, asked)
        template = _the_one(self.tokenizer.chat_template, folder, asked)
        self.tokenizer.chat_template = template
        self.marked = has_marks(template)
        self._check_syntax(folder, asked)
        self.words = Words(folder, self.tokenizer)
        self._added = AddedTokens(self.words.tokenizer, self.words.named)
        self._find_control()
        content = self.words.tokenizer.to_str() + template + repr(self._added.closing)
        self.fingerprint = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def _check_syntax(self, folder: str | Path, asked: str) -> None:
        from jinja2.exceptions import TemplateSyntaxError

        try:
            self.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{asked}: the chat template of {folder} is broken at line {error.lineno}: {one_line(error)}; mend it"
            ) from None
        except Exception:
            pass  # it may refuse this conversation; those it is used for are told one by one

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
        """Ids of a rendered text, and for each the characters it stands for, white space included.

        Raises:
            BadSampleError: the template writes a special token that the vocabulary does not have.
        """
        missing = self.words.missing(text)
        if missing is not None:
            raise BadSampleError(
                "malformed", f"the chat template writes {missing!r}, which tokenizer.json does not have"
            )
        return self.words.encode(text)

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
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except Exception as error:  # a template is a program of somebody else's: it may divide by zero
            raise BadSampleError("malformed", f"the chat template refuses it ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """What an error says, in one line, or else its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def _the_one(template: Any, folder: str | Path, asked: str) -> str:
    """The template of a tokenizer that has one, or one by the name of default for `--chat`."""
    if isinstance(template, dict) and (len(template) == 1 or (asked == "--chat" and "default" in template)):
        template = template.get("default", next(iter(template.values())))
    if isinstance(template, dict) and template:
        raise UserError(
            f"{asked}: {folder} has several chat templates ({', '.join(map(str, template))}); leave one, as its "
            "chat_template.jinja"
        )
    if not isinstance(template, str) or not template:
        instead = "leave --chat out" if asked == "--chat" else "write sft.tokenizer: DIR of the instruction-tuned model"
        raise UserError(
            f"{asked}: {folder} has no chat template; put a chat_template.jinja beside its tokenizer.json, or {instead}"
        )
    return template
