"""Keys of a conversation's record and of its turns. None is dropped silently.

    read       messages, tools, system, role, content, weight, …              used
    content    documents, chat_template_kwargs, reasoning_content, mask, …    written by the chat template, or refused
    harmless   id, source, model, score, … (data/corpus/keys.py)              ignored
    any other                                                                 counted, and reported once per file

Whether a template writes a turn's keys is tested with the template itself (written.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from megalong.data.corpus.keys import unknown, words
from megalong.sft.errors import BadSampleError

SYSTEM = ("system", "system_prompt", "system_message")  # keys of a record that become its first turn
# How datasets say which turns are trained on. `weight` is OpenAI's and Mistral's, 0 or 1; the others are true or false.
WEIGHT, SWITCHES = "weight", ("train", "training", "loss")
TRAIN_KEYS = (WEIGHT, *SWITCHES)
MASK_KEYS = words(
    "mask masks masked loss_mask loss_masks completion_mask prompt_mask assistant_mask assistant_masks labels "
    "label_mask train_detail loss_weight loss_weights loss_scale weights sample_weight trainable train_on_input "
    "train_on_inputs train_on_prompt mask_history"
)
# Keys of a record that its author expects to be part of the text, or to change it.
CONTENT_KEYS = words(
    "documents document context contexts passages knowledge history persona developer instructions chat_template "
    "chat_template_kwargs template_kwargs enable_thinking functions function_call tool_calls prefix suffix reasoning "
    "reasoning_content thinking thoughts thought think name names image images video videos audio audios "
    "response_format"
)
# The same for a turn, unless the chat template writes it.
CONTENT_KEYS_OF_TURN = words(
    "name tool_calls function_call reasoning reasoning_content reasoning_details thinking thought thoughts think "
    "prefix suffix refusal audio audios image images video videos document documents tools functions tool_plan "
    "tool_results citations recipient channel context end_turn eot"
)
# Keys of a turn that link it to another turn or are metadata.
HARMLESS_TURN = words("tool_call_id tool_name annotations cache_control finish_reason stop_reason")
READ_PART = frozenset({"type", "text", *HARMLESS_TURN})


def is_nothing(value: Any) -> bool:
    """Whether a key with this value means nothing: null, false, or empty."""
    return value is None or value is False or (isinstance(value, str | list | Mapping) and not value)


def without(record: Any, keys: Collection[str]) -> Any:
    """A record without `keys`, also in its turns."""
    if isinstance(record, Mapping):
        return {key: without(value, keys) for key, value in record.items() if key not in keys}
    if isinstance(record, list):
        return [without(one, keys) if isinstance(one, Mapping) else one for one in record]
    return record


def unread(
    record: Mapping[str, Any], read: Collection[str], others: Collection[str], texts: Sequence[str]
) -> list[str]:
    """The unused keys of a record that must be reported.

    Args:
        read: the keys that its format reads.
        others: keys of other formats; their text must also be in a turn.
        texts: contents of all turns.

    Raises:
        BadSampleError: an unused key changes what is said or trained on.
    """
    left = [key for key, value in record.items() if key not in read and not is_nothing(value)]
    left += [key for key in SWITCHES if record.get(key) is False]
    for key in left:
        value = record[key]
        if key in others:
            if not _is_in_texts(value, texts):
                raise BadSampleError(
                    "malformed", f"key {key!r} is of another format and its text is in no turn; name the format"
                )
        elif key in MASK_KEYS or (key == WEIGHT and not _is(value, 1)) or (key in SWITCHES and value is not True):
            raise BadSampleError(
                "malformed",
                f"key {key!r} selects what is trained on, but is not read of a record; write weight: 0 into the "
                "assistant's turns that are not to be trained on",
            )
        elif key in CONTENT_KEYS:
            raise BadSampleError(
                "malformed",
                f"key {key!r} changes what is said and is not read; write it into the turns, or name it in the "
                "source's ignore_keys",
            )
    return unknown(left, {*others, *TRAIN_KEYS})


def pop_trained(turns: Iterable[dict[str, Any]]) -> list[bool | None]:
    """Remove the keys that say whether a turn is trained on, and return their value for each turn; None without one.

    Raises:
        BadSampleError: a value is invalid, or asks to train on a turn that is not the assistant's.
    """
    return [_pop_trained(turn) for turn in turns]


def _pop_trained(turn: dict[str, Any]) -> bool | None:
    found: dict[str, bool] = {}
    for key in TRAIN_KEYS:
        if (value := turn.pop(key, None)) is None:
            continue
        if key == WEIGHT and not (_is(value, 0) or _is(value, 1)):
            raise BadSampleError("malformed", f"weight {value!r} of a turn; write 0 (do not train on it) or 1 (train)")
        if key != WEIGHT and not isinstance(value, bool):
            raise BadSampleError("malformed", f"{key} {value!r} of a turn; write false (do not train on it) or true")
        found[key] = bool(value)
    for key in turn:
        if key in MASK_KEYS:
            raise BadSampleError("malformed", f"key {key!r} of a turn is not read; write weight: 0 where it means that")
    if len(set(found.values())) > 1:
        raise BadSampleError("malformed", f"{' and '.join(found)} of a turn contradict each other; keep one")
    wanted = next(iter(found.values()), None)
    if wanted and turn.get("role") != "assistant":
        raise BadSampleError(
            "malformed",
            f"{next(iter(found))} of a turn of role {turn.get('role')!r} asks to train on it; only assistant turns "
            "are trained on: leave it out",
        )
    return wanted


def unread_of_parts(content: list[Any]) -> set[str]:
    """The unused keys of content in parts that must be reported.

    Raises:
        BadSampleError: a key selects what is trained on.
    """
    found: set[str] = set()
    for part in content:
        if isinstance(part, Mapping):
            for key, value in part.items():
                if key in MASK_KEYS or key in TRAIN_KEYS:
                    if value is not None:
                        raise BadSampleError("malformed", f"key {key!r} of a part of a turn's content is not read")
                elif not is_nothing(value):
                    found.update(f"content.{name}" for name in unknown([key], READ_PART))
    return found


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == number


def _is_in_texts(value: Any, texts: Sequence[str]) -> bool:
    """Whether a text, or every text of a list of turns, is in one of `texts`. White space is ignored."""
    if isinstance(value, str):
        wanted = " ".join(value.split())
        return any(wanted in " ".join(text.split()) for text in texts)
    if isinstance(value, Mapping):
        value = [value.get(key) for key in ("content", "value") if value.get(key) is not None]
    return isinstance(value, list) and all(_is_in_texts(one, texts) for one in value)
