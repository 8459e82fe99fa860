"""Which tokens of a conversation are learnt: the assistant's, the token that ends a turn included.

A template that marks its answers with `{% generation %}` says so itself (marks.py). For others an answer is what a turn
adds:

    prompt  = template(turns before it, add_generation_prompt)      <|user|>Hi<|end|><|assistant|>
    through = template(turns up to it)                              <|user|>Hi<|end|><|assistant|>Hello<|end|>⏎
    answer  = through without prompt, and without white space behind a closing special token    Hello<|end|>

Both must be how the whole conversation's text begins. A template that rewrites earlier turns when later ones come (that
drops their reasoning, for instance) needs marks: without them such a conversation is refused, never masked by guess.

Marks are held against what the turns add, wherever it can be told. Marks on anybody else's text are refused. An answer
that is written and not marked stays unlearnt, as the template says, and is counted. Turns that say they are not learnt
(`weight: 0`) are taken out of either: all that they add to the text is not learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from megalong.sft.formats import BadSampleError, Conversation, Message
from megalong.sft.marks import Span
from megalong.sft.spelled import texts
from megalong.sft.template import ChatTemplate

# Under which names templates read what the assistant says.
_SAID = ("content", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Tokens:
    """int64 ids [n] of a conversation, and bool [n]: those that count when they are predicted.

    `unmarked` says which answer the template writes without marking it, "" for none.
    """

    ids: np.ndarray
    targets: np.ndarray
    unmarked: str = ""


@dataclass(frozen=True)
class _Added:
    """What a turn adds to the text: its answer [start, end), and more up to `through`."""

    start: int
    end: int
    through: int


def tokenize(template: ChatTemplate, conversation: Conversation) -> Tokens:
    """The tokens of a conversation and which of them are learnt.

    Raises:
        BadSampleError: the template refuses it, or it has no token of the assistant's.
    """
    conversation = template.with_calls(conversation)
    template.refuse_added(conversation)
    text = template.text(conversation.messages, conversation.tools)
    unmarked = ""
    if template.marked:
        spans = template.marks(conversation, text)
        unmarked = _held_against_turns(template, conversation, text, spans)
    else:
        spans = by_prefix(template, conversation, text)
    ids, offsets = template.tokens(text)
    targets = _touched(text, offsets, spans)
    if conversation.unlearnt:
        targets &= ~_touched(text, offsets, _unlearnt(template, conversation, text))
    if not targets.any():
        raise BadSampleError("no_assistant", "the template gives the assistant no token")
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
            f"the chat template writes turn {number} otherwise when more turns follow; mark the assistant's text in it "
            "with {% generation %}"
        )
        added = _added(template, conversation, text, number, refusal)
        spans.append((added.start, added.end))
    return spans


def _unlearnt(template: ChatTemplate, conversation: Conversation, text: str) -> list[Span]:
    """The characters of the assistant's turns that are not to be learnt.

    Raises:
        BadSampleError: the template refuses a part of it, or writes such a turn otherwise when more turns follow.
    """
    spans = []
    for number in sorted(conversation.unlearnt):
        if number >= len(conversation.messages):  # the conversation has been shortened
            continue
        refusal = (
            f"turn {number} is not to be learnt, but the chat template writes it otherwise when more turns follow; "
            "leave its weight out, or end the conversation before it"
        )
        added = _added(template, conversation, text, number, refusal)
        spans.append((added.start, added.through))
    return spans


def _touched(text: str, offsets: list[tuple[int, int]], spans: list[Span]) -> np.ndarray:
    """bool [n]: the tokens, by their characters' places in the text, of which a character lies within a span."""
    inside = np.zeros(len(text) + 1, bool)
    for start, end in spans:
        inside[start:end] = True
    before = np.concatenate([[0], np.cumsum(inside)])  # characters to learn ahead of each
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    learnt: np.ndarray = before[np.maximum(ends, starts + 1)] > before[starts]
    return learnt


def _added(template: ChatTemplate, conversation: Conversation, text: str, number: int, refusal: str) -> _Added:
    """What a turn adds to the text.

    Raises:
        BadSampleError: `refusal`, where the template writes the turn otherwise when more turns follow.
    """
    messages, tools = conversation.messages, conversation.tools
    prompt = template.text(messages[:number], tools, prompt=True) if number else ""
    through = template.text(messages[: number + 1], tools)
    if not (text.startswith(through) and through.startswith(prompt)):
        raise BadSampleError("malformed", refusal)
    closed = through.rstrip()
    end = len(closed) if template.ends_with_special(closed) else len(through)
    return _Added(len(prompt), end, len(through))


def _held_against_turns(template: ChatTemplate, conversation: Conversation, text: str, spans: list[Span]) -> str:
    """Hold marks against what each of the assistant's turns adds; what an answer without marks is told as, or "".

    Raises:
        BadSampleError: marks on text that is not the assistant's.
    """
    marked, others, unmarked = np.zeros(len(text), bool), np.ones(len(text), bool), ""
    for start, end in spans:
        marked[start:end] = True
    answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    turns = [_turn(template, conversation, text, number) for number in answers]
    for number, turn in zip(answers, turns, strict=True):
        if turn is not None:
            others[turn.start : turn.through] = False
            learnt = "".join(text[max(start, turn.start) : min(end, turn.through)] for start, end in spans)
            written = text[turn.start : turn.through]
            lost = [said for said in _said(conversation.messages[number]) if said in written and said not in learnt]
            unmarked = unmarked or (
                f"the chat template writes turn {number} without marking {lost[0]!r}" if lost else ""
            )
    if None not in turns and (marked & others).any():
        place = int(np.flatnonzero(marked & others)[0])
        raise BadSampleError(
            "malformed",
            f"the chat template marks {text[place : place + 40]!r} with {{% generation %}}, and that is not the "
            "assistant's",
        )
    return unmarked


def _turn(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> _Added | None:
    """A turn with its header, which a template may mark; None where it cannot be told what the turn adds."""
    messages, tools = conversation.messages, conversation.tools
    try:
        before = template.text(messages[:number], tools) if number else ""
        through = template.text(messages[: number + 1], tools)
    except BadSampleError:
        return None
    if not (text.startswith(through) and through.startswith(before)):
        return None
    return _Added(len(before), len(through), len(through))


def _said(message: Message) -> list[str]:
    """The texts of an assistant's turn: what it says, and the functions it calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls", []) if isinstance(call, Mapping)]
    fields = [message.get(key) for key in _SAID] + [call.get("name") for call in calls]
    return [text.strip() for text in texts(fields) if text.strip()]


def shorten(template: ChatTemplate, conversation: Conversation, limit: int) -> Tokens:
    """As many whole exchanges as fit into `limit` tokens, else the first one up to `limit`, ending with an answer.

    Cutting tokens and not text leaves no half of a special token; a sample ends with a token that is learnt, so none
    ends inside the header of a turn. An answer that is cut has no end-of-turn: the model is not taught to stop there.

    Raises:
        BadSampleError: nothing of the assistant's lies within `limit`.
    """
    messages = conversation.messages
    answers = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(answers):
        tokens = tokenize(template, replace(conversation, messages=messages[:end]))
        if len(tokens.ids) <= limit:
            return tokens
    learnt = np.flatnonzero(tokens.targets[:limit])
    if len(learnt) == 0:
        raise BadSampleError("too_long", f"no answer begins within {limit} tokens")
    end = int(learnt[-1]) + 1
    return Tokens(tokens.ids[:end], tokens.targets[:end])
