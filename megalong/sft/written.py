"""Checks that a chat template writes everything that a conversation contains.

The conversation is rendered once more with a marker after each of its texts: contents, names of tools and of calls, and
every other key of a turn. A marker that is missing in the result shows what the template leaves out:

    {"role": "tool", "content": "12 °Cmgl3x"}  →  …<|user|>Hi mgl0x<|end|><|assistant|>…       turn 3 is not written

What a template does not support (tools, a system turn, a turn's `name`) is therefore refused and not dropped. Each
content, tool and call must be written. Another key needs to be written for one turn only, because templates leave out
the reasoning of earlier turns on purpose. A key whose value is not text is tested by rendering without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megalong.data.corpus.keys import HARMLESS
from megalong.sft.errors import BadSampleError
from megalong.sft.keys import CONTENT_KEYS_OF_TURN, HARMLESS_TURN, is_nothing

Write = Callable[[list[dict[str, Any]], list[Any] | None], str]
_MARKER = re.compile(r"mgl(\d+)x")
_PLAIN = {"role", "content"}


def unwritten(write: Write, turns: Sequence[dict[str, Any]], tools: list[Any] | None) -> set[str]:
    """The keys of turns that must be reported: the template does not write them, and they are not metadata.

    Args:
        write: renders (turns, tools) with the template.

    Raises:
        BadSampleError: a content, a tool, a call, or a key that changes what is said, is not written.
    """
    if not tools and all(turn.keys() <= _PLAIN and turn["role"] in ("user", "assistant") for turn in turns):
        return set()  # what every template writes
    marks = _Marks()
    marked, marked_tools = [marks.turn(turn, number) for number, turn in enumerate(turns)], marks.each(tools, "tool")
    try:
        text = write(marked, marked_tools)
        missing = marks.missing(text) + _without_effect(write, turns, tools)
    except BadSampleError:
        return set()  # the template inspects texts; if it refuses this conversation, tokenizing reports it
    for what in missing:
        if what.startswith("key "):
            key = what.removeprefix("key ")
            if key in CONTENT_KEYS_OF_TURN:
                raise BadSampleError(
                    "malformed",
                    f"the chat template does not write {key!r} of a turn, which changes what is said; write it into "
                    "the content, or name it in the source's ignore_keys",
                )
        else:
            raise BadSampleError("malformed", f"the chat template does not write {what}; give one that does")
    return {what.removeprefix("key ") for what in missing}


class _Marks:
    """Adds markers to texts, and remembers what each stands for."""

    def __init__(self) -> None:
        self._places: list[str] = []

    def turn(self, turn: dict[str, Any], number: int) -> dict[str, Any]:
        """A turn with a marker in each of its values."""
        role, marked = turn["role"], dict(turn)
        for key, value in turn.items():
            if key == "content":
                marked[key] = self._marked(value, f"the content of turn {number}, of role {role}") if value else value
            elif key == "tool_calls":
                marked[key] = self.each(value, f"call of a tool in turn {number}")
            elif _must_be_written(key, value, role) and not isinstance(value, bool | int | float):
                marked[key] = self._marked(value, f"key {key}")
        return marked

    def each(self, values: Any, what: str) -> Any:
        """A list with a marker in each of its values."""
        if not isinstance(values, list):
            return values
        return [self._marked(value, f"{what} {number}") for number, value in enumerate(values)]

    def missing(self, text: str) -> list[str]:
        """What has no marker in `text`, in order."""
        seen = {self._places[int(number)] for number in _MARKER.findall(text) if int(number) < len(self._places)}
        return [place for place in dict.fromkeys(self._places) if place not in seen]

    def _marked(self, value: Any, place: str) -> Any:
        """`value` with a marker after its name, or else after its first text; unchanged if it contains no text."""
        if isinstance(value, str):
            self._places.append(place)
            return f"{value}mgl{len(self._places) - 1}x"
        if isinstance(value, dict):
            for key in sorted(value, key=lambda key: (key != "function", key != "name")):
                if (inner := self._marked(value[key], place)) is not value[key]:
                    return {**value, key: inner}
        if isinstance(value, list):
            for number, one in enumerate(value):
                if (inner := self._marked(one, place)) is not one:
                    return [*value[:number], inner, *value[number + 1 :]]
        return value


def _must_be_written(key: str, value: Any, role: str) -> bool:
    """Whether a key of a turn must be written or reported. The name in a tool's turn repeats that of the call."""
    harmless = key in HARMLESS_TURN or key.lower() in HARMLESS or (key == "name" and role == "tool")
    return key not in _PLAIN and key != "tool_calls" and not harmless and not is_nothing(value)


def _without_effect(write: Write, turns: Sequence[dict[str, Any]], tools: list[Any] | None) -> list[str]:
    """Keys whose values are numbers or true, and without which the text is the same."""
    keys = dict.fromkeys(
        key
        for turn in turns
        for key, value in turn.items()
        if isinstance(value, bool | int | float) and _must_be_written(key, value, turn["role"])
    )
    if not keys:
        return []
    text = write(list(turns), tools)
    return [
        f"key {key}"
        for key in keys
        if write([{name: value for name, value in turn.items() if name != key} for turn in turns], tools) == text
    ]
