"""The tokens of turns that are not learnt, though they are the assistant's (`weight: 0`).

Such a turn is all that it adds to the text, from where the template asks for it to where the turn ends:

    template(turns before it, add_generation_prompt) | the turn | the turns behind it

If the whole text does not begin with both, the template writes early turns otherwise when more follow, and the
conversation is refused: where the turn lies would be a guess.
"""

from __future__ import annotations

import numpy as np

from megalong.sft.errors import BadSampleError
from megalong.sft.formats import Conversation
from megalong.sft.template import ChatTemplate


def unlearnt_tokens(template: ChatTemplate, conversation: Conversation) -> np.ndarray:
    """bool [n]: for each token of a conversation whether it is of a turn that is not learnt.

    Raises:
        BadSampleError: the template refuses a part of it, or writes early turns otherwise when later ones come.
    """
    messages, tools = conversation.messages, conversation.tools
    text = template.text(messages, tools)
    starts, ends = np.array(template.tokens(text)[1], np.int64).reshape(-1, 2).T
    found = np.zeros(len(starts), bool)
    for number in sorted(conversation.unlearnt):
        if number >= len(messages):  # the conversation has been shortened
            continue
        before = template.text(messages[:number], tools, prompt=True) if number else ""
        through = template.text(messages[: number + 1], tools)
        if not (text.startswith(through) and through.startswith(before)):
            raise BadSampleError(
                "malformed",
                f"turn {number} is not to be learnt, but the chat template writes it otherwise when more turns follow; "
                "leave its weight out, or end the conversation before it",
            )
        found |= (ends > len(before)) & (starts < len(through))
    return found
