"""Which tokens of a conversation are learnt: the assistant's, the token that ends a turn included.

A template that marks its answers with `{% generation %}` says so itself. For others an answer is what a turn adds:

    prompt  = template(turns before it, add_generation_prompt)      <|user|>Hi<|end|><|assistant|>
    through = template(turns up to it)                              <|user|>Hi<|end|><|assistant|>Hello<|end|>⏎
    answer  = through without prompt, and without white space behind a closing special token    Hello<|end|>

Both must be how the whole conversation's text begins. A template that rewrites earlier turns when later ones come (that
drops their reasoning, for instance) needs marks: without them such a conversation is refused, never masked by guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalong.sft.formats import BadSampleError, Conversation
from megalong.sft.template import ChatTemplate


@dataclass(frozen=True)
class Tokens:
    """int64 ids [n] of a conversation, and bool [n]: those that count when they are predicted."""

    ids: np.ndarray
    targets: np.ndarray


def tokenize(template: ChatTemplate, conversation: Conversation) -> Tokens:
    """The tokens of a conversation and which of them are learnt.

    Raises:
        BadSampleError: the template refuses it, or it has no token of the assistant's.
    """
    template.refuse_added(conversation)
    ids, targets = template.marked_tokens(conversation) if template.marked else by_prefix(template, conversation)
    if not any(targets):
        raise BadSampleError("no_assistant", "the template gives the assistant no token")
    return Tokens(np.array(ids, np.int64), np.array(targets, bool))


def by_prefix(template: ChatTemplate, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Ids, and the assistant's among them by what each of its turns adds.

    Raises:
        BadSampleError: the template refuses a part of it, or writes early turns differently when later ones come.
    """
    messages, tools = conversation.messages, conversation.tools
    text = template.text(messages, tools)
    ids, offsets = template.tokens(text)
    targets = np.zeros(len(ids), bool)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise BadSampleError(
                "malformed",
                "begins with the assistant's turn; mark its text in the chat template with {% generation %}",
            )
        prompt = template.text(messages[:number], tools, prompt=True)
        through = template.text(messages[: number + 1], tools)
        if not (text.startswith(through) and through.startswith(prompt)):
            raise BadSampleError(
                "malformed",
                f"the chat template writes turn {number} otherwise when more turns follow; mark the assistant's text "
                "in it with {% generation %}",
            )
        closed = through.rstrip()
        end = len(closed) if template.ends_with_special(closed) else len(through)
        targets |= (ends > len(prompt)) & (starts < end)
    return ids, targets.tolist()


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
        tokens = tokenize(template, Conversation(messages[:end], conversation.tools))
        if len(tokens.ids) <= limit:
            return tokens
    learnt = np.flatnonzero(tokens.targets[:limit])
    if len(learnt) == 0:
        raise BadSampleError("too_long", f"no answer begins within {limit} tokens")
    end = int(learnt[-1]) + 1
    return Tokens(tokens.ids[:end], tokens.targets[:end])
