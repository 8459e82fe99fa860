"""Keys of a conversation's record and of its turns: what each is for, so that none is dropped without a word.

    read       messages, tools, system, role, content, weight, …              used
    speaking   documents, chat_template_kwargs, reasoning_content, mask, …    written by the chat template, or refused
    harmless   id, source, model, score, … (data/corpus/keys.py)                     left alone
    any other                                                                 counted, and told once a file

What a template makes of a turn's keys is asked of the template itself: written.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from megalong.data.corpus.keys import unknown, words
from megalong.sft.errors import BadSampleError

SYSTEM = ("system", "system_prompt", "system_message")  # of a record: its first turn
# How datasets say which turns are learnt. `weight` is OpenAI's and Mistral's, 0 or 1; the others are true or false.
WEIGHT, SWITCHES = "weight", ("train", "training", "loss")
LEARNING = (WEIGHT, *SWITCHES)
MASKS = words(
    "mask masks masked loss_mask loss_masks completion_mask prompt_mask assistant_mask assistant_masks labels "
    "label_mask train_detail loss_weight loss_weights loss_scale weights sample_weight trainable train_on_input "
    "train_on_inputs train_on_prompt mask_history"
)
# Of a record: what its author expects to be said, or to change how it is said.
SPEAKING = words(
    "documents document context contexts passages knowledge history persona developer instructions chat_template "
    "chat_template_kwargs template_kwargs enable_thinking functions function_call tool_calls prefix suffix reasoning "
    "reasoning_content thinking thoughts thought think name names image images video videos audio audios "
    "response_format"
)
# Of a turn: as above, unless the chat template writes it.
SPEAKING_TURN = words(
    "name tool_calls function_call reasoning reasoning_content reasoning_details thinking thought thoughts think "
    "prefix suffix refusal audio audios image images video videos document documents tools functions tool_plan "
    "tool_results citations recipient channel context end_turn eot"
)
# Of a turn: what ties it to another or says how it came about.
HARMLESS_TURN = words("tool_call_id tool_name annotations cache_control finish_reason stop_reason")
READ_PART = frozenset({"type", "text", *HARMLESS_TURN})


def is_nothing(value: Any) -> bool:
    """Whether a key with this value says nothing: null, false, or empty."""
    return value is None or value is False or (isinstance(value, str | list | Mapping) and not value)


def without(record: Any, keys: Collection[str]) -> Any:
    """A record without `keys`, in itself and in its turns."""
    if isinstance(record, Mapping):
        return {key: without(value, keys) for key, value in record.items() if key not in keys}
    if isinstance(record, list):
        return [without(one, keys) if isinstance(one, Mapping) else one for one in record]
    return record


def unread(
    record: Mapping[str, Any], read: Collection[str], others: Collection[str], texts: Sequence[str]
) -> list[str]:
    """The keys of a record that are to be told.

    Args:
        read: the keys that its format reads.
        others: keys of other formats: what they say must be said anyway.
        texts: contents of all turns.

    Raises:
        BadSampleError: a key changes what is said or learnt, and is not read.
    """
    left = [key for key, value in record.items() if key not in read and not is_nothing(value)]
    left += [key for key in SWITCHES if record.get(key) is False]
    for key in left:
        value = record[key]
        if key in others:
            if not _is_said(value, texts):
                raise BadSampleError(
                    "malformed", f"key {key!r} is of another format and its text is in no turn; name one by format"
                )
        elif key in MASKS or (key == WEIGHT and not _is(value, 1)) or (key in SWITCHES and value is not True):
            raise BadSampleError(
                "malformed",
                f"key {key!r} says what is learnt and is not read of a record; write weight: 0 into the assistant's "
                "turns that are not to be learnt",
            )
        elif key in SPEAKING:
            raise BadSampleError(
                "malformed",
                f"key {key!r} changes what is said and is not read; write it into the turns, or name it in the "
                "source's ignore_keys",
            )
    return unknown(left, {*others, *LEARNING})


def take_learnt(turns: Iterable[dict[str, Any]]) -> list[bool | None]:
    """For each turn whether its keys say that it is learnt (None: nothing); these keys are taken out of the turns.

    Raises:
        BadSampleError: a value is neither yes nor no, or a turn that is never learnt is to be.
    """
    return [_take_learnt(turn) for turn in turns]


def _take_learnt(turn: dict[str, Any]) -> bool | None:
    found: dict[str, bool] = {}
    for key in LEARNING:
        if (value := turn.pop(key, None)) is None:
            continue
        if key == WEIGHT and not (_is(value, 0) or _is(value, 1)):
            raise BadSampleError("malformed", f"weight {value!r} of a turn; write 0 (not learnt) or 1 (learnt)")
        if key != WEIGHT and not isinstance(value, bool):
            raise BadSampleError("malformed", f"{key} {value!r} of a turn; write false (not learnt) or true (learnt)")
        found[key] = bool(value)
    for key in turn:
        if key in MASKS:
            raise BadSampleError("malformed", f"key {key!r} of a turn is not read; write weight: 0 where it means that")
    if len(set(found.values())) > 1:
        raise BadSampleError("malformed", f"{' and '.join(found)} of a turn contradict each other; leave one")
    wanted = next(iter(found.values()), None)
    if wanted and turn.get("role") != "assistant":
        raise BadSampleError(
            "malformed",
            f"{next(iter(found))} of a turn of role {turn.get('role')!r} says that it is learnt; only the assistant's "
            "are: leave it out",
        )
    return wanted


def unread_of_parts(content: list[Any]) -> set[str]:
    """The keys of content in parts that are to be told.

    Raises:
        BadSampleError: a key says what is learnt.
    """
    found: set[str] = set()
    for part in content:
        if isinstance(part, Mapping):
            for key, value in part.items():
                if key in MASKS or key in LEARNING:
                    if value is not None:
                        raise BadSampleError("malformed", f"key {key!r} of a part of a turn's content is not read")
                elif not is_nothing(value):
                    found.update(f"content.{name}" for name in unknown([key], READ_PART))
    return found


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == number


def _is_said(value: Any, texts: Sequence[str]) -> bool:
    """Whether a text, or every text of a list of turns, is part of what is said; white space aside."""
    if isinstance(value, str):
        wanted = " ".join(value.split())
        return any(wanted in " ".join(text.split()) for text in texts)
    if isinstance(value, Mapping):
        value = [value.get(key) for key in ("content", "value") if value.get(key) is not None]
    return isinstance(value, list) and all(_is_said(one, texts) for one in value)
