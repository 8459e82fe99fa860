"""The targets of a conversation: the assistant's tokens, including the token that ends a turn.

A template may mark its answers with `{% generation %}` (marks.py). Otherwise an answer is what a turn adds to the text:

    prompt  = template(turns before it, add_generation_prompt)      <|user|>Hi<|end|><|assistant|>
    through = template(turns up to it)                              <|user|>Hi<|end|><|assistant|>Hello<|end|>⏎
    answer  = through without prompt, and without white space after a closing special token    Hello<|end|>

Both must be prefixes of the whole conversation's text. A template that rewrites earlier turns when later ones follow
(that drops their reasoning, for instance) needs marks. Without them such a conversation is refused, never masked by a
guess.

Marks are compared with what the turns add, if that can be determined. Marks on text that is not the assistant's are
refused. An answer that is written but not marked is not trained on, as the template says, and is counted. Turns with
`weight: 0` are excluded in either case: nothing that they add to the text is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from megalong.sft.formats import BadSampleError, Conversation, Message
from megalong.sft.marks import Span
from megalong.sft.spelled import texts
from megalong.sft.template import ChatTemplate

# Keys under which templates read the assistant's text.
_TEXT_KEYS = ("content", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a conversation: int64 IDs [n], and bool [n]: the tokens that are targets.

    `unmarked` says which answer the template writes without marking it, "" for none.
    """

    ids: np.ndarray
    targets: np.ndarray
    unmarked: str = ""


@dataclass(frozen=True)
class _Added:
    """What a turn adds to the text: its answer [start, end), and the rest up to `through`."""

    start: int
    end: int
    through: int


def tokenize(template: ChatTemplate, conversation: Conversation) -> Tokens:
    """The tokens of a conversation and its targets.

    Raises:
        BadSampleError: the template refuses it, or it has no assistant token.
    """
    conversation = template.with_calls(conversation)
    template.refuse_added(conversation)
    text = template.text(conversation.messages, conversation.tools)
    unmarked = ""
    if template.marked:
        spans = template.marks(conversation, text)
        unmarked = _check_marks(template, conversation, text, spans)
    else:
        spans = by_prefix(template, conversation, text)
    ids, offsets = template.tokens(text)
    targets = _token_mask(text, offsets, spans)
    if conversation.untrained:
        targets &= ~_token_mask(text, offsets, _untrained(template, conversation, text))
    if not targets.any():
        raise BadSampleError("no_assistant", "the chat template writes no assistant token")
    return Tokens(np.array(ids, np.int64), targets, unmarked)


def by_prefix(template: ChatTemplate, conversation: Conversation, text: str) -> list[Span]:
    """The assistant's characters of `text` by what each of its turns adds.

    Raises:
        BadSampleError: the template refuses a part of it, or writes early turns differently when later ones come.
    """
    spans = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise BadSampleError(
                "malformed",
                "begins with the assistant's turn; mark its text in the chat template with {% generation %}",
            )
        refusal = (
            f"the chat template writes turn {number} differently when more turns follow; mark the assistant's text in "
            "it with {% generation %}"
        )
        added = _added(template, conversation, text, number, refusal)
        spans.append((added.start, added.end))
    return spans


def _untrained(template: ChatTemplate, conversation: Conversation, text: str) -> list[Span]:
    """The characters of the assistant's turns that are not to be trained on.

    Raises:
        BadSampleError: the template refuses a part of it, or writes such a turn differently when more turns follow.
    """
    spans = []
    for number in sorted(conversation.untrained):
        if number >= len(conversation.messages):  # the conversation has been shortened
            continue
        refusal = (
            f"turn {number} has weight 0, but the chat template writes it differently when more turns follow; "
            "leave its weight out, or end the conversation before it"
        )
        added = _added(template, conversation, text, number, refusal)
        spans.append((added.start, added.through))
    return spans


def _token_mask(text: str, offsets: list[tuple[int, int]], spans: list[Span]) -> np.ndarray:
    """bool [n]: the tokens with a character inside one of the spans; `offsets` are their places in the text."""
    inside = np.zeros(len(text) + 1, bool)
    for start, end in spans:
        inside[start:end] = True
    before = np.concatenate([[0], np.cumsum(inside)])  # characters inside spans, before each character
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    mask: np.ndarray = before[np.maximum(ends, starts + 1)] > before[starts]
    return mask


def _added(template: ChatTemplate, conversation: Conversation, text: str, number: int, refusal: str) -> _Added:
    """What a turn adds to the text.

    Raises:
        BadSampleError: `refusal`, if the template writes the turn differently when more turns follow.
    """
    messages, tools = conversation.messages, conversation.tools
    prompt = template.text(messages[:number], tools, prompt=True) if number else ""
    through = template.text(messages[: number + 1], tools)
    if not (text.startswith(through) and through.startswith(prompt)):
        raise BadSampleError("malformed", refusal)
    closed = through.rstrip()
    end = len(closed) if template.ends_with_special(closed) else len(through)
    return _Added(len(prompt), end, len(through))


def _check_marks(template: ChatTemplate, conversation: Conversation, text: str, spans: list[Span]) -> str:
    """Compare marks with what each assistant turn adds. Returns a message about an answer without marks, or "".

    Raises:
        BadSampleError: text that is not the assistant's is marked.
    """
    marked, others, unmarked = np.zeros(len(text), bool), np.ones(len(text), bool), ""
    for start, end in spans:
        marked[start:end] = True
    answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    turns = [_turn(template, conversation, text, number) for number in answers]
    for number, turn in zip(answers, turns, strict=True):
        if turn is not None:
            others[turn.start : turn.through] = False
            target = "".join(text[max(start, turn.start) : min(end, turn.through)] for start, end in spans)
            written = text[turn.start : turn.through]
            lost = [
                said
                for said in _assistant_texts(conversation.messages[number])
                if said in written and said not in target
            ]
            unmarked = unmarked or (
                f"the chat template writes turn {number} without marking {lost[0]!r}" if lost else ""
            )
    if None not in turns and (marked & others).any():
        place = int(np.flatnonzero(marked & others)[0])
        raise BadSampleError(
            "malformed",
            f"the chat template marks {text[place : place + 40]!r} with {{% generation %}}, but that is not the "
            "assistant's text",
        )
    return unmarked


def _turn(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> _Added | None:
    """A turn with its header, which a template may mark; None if what the turn adds cannot be determined."""
    messages, tools = conversation.messages, conversation.tools
    try:
        before = template.text(messages[:number], tools) if number else ""
        through = template.text(messages[: number + 1], tools)
    except BadSampleError:
        return None
    if not (text.startswith(through) and through.startswith(before)):
        return None
    return _Added(len(before), len(through), len(through))


def _assistant_texts(message: Message) -> list[str]:
    """The texts of an assistant turn: what it says, and the functions it calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls", []) if isinstance(call, Mapping)]
    fields = [message.get(key) for key in _TEXT_KEYS] + [call.get("name") for call in calls]
    return [text.strip() for text in texts(fields) if text.strip()]


def shorten(template: ChatTemplate, conversation: Conversation, limit: int) -> Tokens:
    """As many whole exchanges as fit into `limit` tokens, or else the first `limit` tokens up to the last target.

    Tokens are cut and not text, so no special token is split. The result ends with a target, so never inside the header
    of a turn. An answer that is cut has no end-of-turn token: the model is not taught to stop there.

    Raises:
        BadSampleError: the first `limit` tokens contain no target.
    """
    messages = conversation.messages
    answers = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(answers):
        tokens = tokenize(template, replace(conversation, messages=messages[:end]))
        if len(tokens.ids) <= limit:
            return tokens
    targets = np.flatnonzero(tokens.targets[:limit])
    if len(targets) == 0:
        raise BadSampleError("too_long", f"no answer begins within {limit} tokens")
    end = int(targets[-1]) + 1
    return Tokens(tokens.ids[:end], tokens.targets[:end])
