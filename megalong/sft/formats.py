"""Four ways to write a conversation down, read as one: messages with a role and content, and the tools on offer.

    messages           {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
    conversations      {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}   (ShareGPT)
    alpaca             {"instruction": …, "input": …, "output": …}
    prompt_completion  {"prompt": …, "completion": …}, each a text or a list of messages

A record's format is found by its keys unless the source names one. What cannot be read says which rule it falls under.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalong.sft.tool_calls import Message, read_calls, read_tools

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
KEYS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}


class BadSampleError(Exception):
    """A conversation that cannot be used.

    Attributes:
        reason: the rule it falls under: empty, no_assistant, unknown_role, malformed or too_long.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them; `tools` are the functions the assistant may call."""

    messages: list[Message]
    tools: list[Any] | None = None


def read_conversation(record: Any, format: str = "auto") -> Conversation:
    """A record of any format as a conversation whose roles and contents are known to be usable.

    Raises:
        BadSampleError: it is not.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError("malformed", f"a {type(record).__name__} and not an object, {{…}}")
    format = _format(record) if format == "auto" else format
    missing = [key for key in KEYS[format] if key not in record]
    if missing:
        raise BadSampleError("malformed", f"no key {missing[0]!r}, which {format} has (there are: {', '.join(record)})")
    messages = _READERS[format](record)
    _check(messages)
    try:
        messages, tools = [read_calls(message) for message in messages], read_tools(record.get("tools") or None)
    except ValueError as error:
        raise BadSampleError("malformed", str(error)) from None
    return Conversation(messages, tools or None)


def _format(record: Mapping[str, Any]) -> str:
    for name, keys in KEYS.items():
        if all(key in record for key in keys):
            return name
    raise BadSampleError(
        "malformed", f"keys {', '.join(record) or 'none'} are of no known format: {', '.join(KEYS)}; name it by format"
    )


def _messages(record: Mapping[str, Any]) -> list[Message]:
    return _list(record["messages"])


def _conversations(record: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in _list(record["conversations"]):
        if "from" not in turn or "value" not in turn:
            raise BadSampleError("malformed", "a turn of conversations without from and value")
        role = SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadSampleError("unknown_role", f"from {turn['from']!r} is none of {', '.join(SHAREGPT)}")
        messages.append({"role": role, "content": turn["value"]})
    return _with_system(record, messages)


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    question = record["instruction"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    turns: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    return _with_system(record, turns)


def _prompt_completion(record: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        turns += [{"role": role, "content": value}] if isinstance(value, str) else _list(value)
    return _with_system(record, turns)


_READERS = {
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = record.get("system")
    return [{"role": "system", "content": system}, *messages] if isinstance(system, str) and system else messages


def _list(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadSampleError("malformed", "its turns are no list of objects")
    # Parquet gives every turn every key; those that are null were never written.
    turns = [{key: inner for key, inner in turn.items() if inner is not None} for turn in value]
    return [turn | {"content": _joined(turn["content"])} if "content" in turn else turn for turn in turns]


def _joined(content: Any) -> Any:
    """Content in parts, as OpenAI writes it too, as one text; anything but texts is left for `_check` to refuse."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else content


def _check(messages: list[Message]) -> None:
    for message in messages:
        if message.get("role") not in ROLES:
            raise BadSampleError("unknown_role", f"role {message.get('role')!r} is none of {', '.join(ROLES)}")
        content = message.get("content", "")
        if not isinstance(content, str):
            raise BadSampleError("malformed", f"content of type {type(content).__name__}; it must be text")
        if "content" not in message and not message.get("tool_calls"):
            raise BadSampleError("malformed", f"a turn of role {message['role']} without content")
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in messages):
        raise BadSampleError("empty", "no turn has any text")
    if not any(
        message["role"] == "assistant" and (message.get("content", "").strip() or message.get("tool_calls"))
        for message in messages
    ):
        raise BadSampleError("no_assistant", "no turn of the assistant's has any text")
