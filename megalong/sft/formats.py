"""Reads four conversation formats into one: messages with a role and content, and the tools on offer.

    messages           {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
    conversations      {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}   (ShareGPT)
    alpaca             {"instruction": …, "input": …, "output": …}
    prompt_completion  {"prompt": …, "completion": …}, each a text or a list of messages

The format of a record is detected from its keys unless the source names one. The error of an unusable record names the
rule that applies.

`tools` are read too, and `system` becomes the first turn. A turn keeps its other keys for the chat template, except
those that say whether it is trained on: `weight` (0 or 1), `train`, `training`, `loss` (true or false). An assistant's
turn inside a `prompt` is not trained on unless such a key says so. No key is dropped silently: see keys.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalong.data.corpus.records import half_surrogate
from megalong.sft.errors import BadSampleError as BadSampleError
from megalong.sft.keys import SYSTEM, TRAIN_KEYS, WEIGHT, is_nothing, pop_trained, unread, unread_of_parts, without
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
MAY_HAVE = {  # optional keys; Alpaca's `text` repeats what its other keys say
    "alpaca": ("input", "text"),
}
ALL_KEYS = {*(key for keys in KEYS.values() for key in keys), "input"}


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates expect; `tools` are the functions that the assistant may call.

    Attributes:
        untrained: indices of the assistant's messages that are not trained on.
        unread: unused keys that are not known metadata.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()
    unread: tuple[str, ...] = ()


def read_conversation(record: Any, format: str = "auto", ignore: Sequence[str] = ()) -> Conversation:
    """Read a record of any format as a conversation with checked roles and contents.

    Args:
        ignore: keys of the record and of its turns that are left out.

    Raises:
        BadSampleError: the record is not usable, or an unused key changes what is said or trained on.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError("malformed", f"a {type(record).__name__} and not an object, {{…}}")
    # Parquet gives every record and every turn all keys of its column; a null means that the key was not written.
    record = {key: value for key, value in without(record, ignore).items() if value is not None}
    named, format = format != "auto", _format(record) if format == "auto" else format
    missing = [key for key in KEYS[format] if key not in record]
    if missing:
        raise BadSampleError("malformed", f"no key {missing[0]!r}, which {format} has (there are: {', '.join(record)})")
    turns = _with_system(record, _READERS[format](record))
    unused = {key for turn in turns for key in _join_content(turn)}
    _check(turns)
    turns, tools = _read_calls(turns, record.get("tools"))
    trained = pop_trained(turns)
    untrained = frozenset(n for n, one in enumerate(trained) if one is False and turns[n]["role"] == "assistant")
    if not any(_answers(turn) for n, turn in enumerate(turns) if n not in untrained):
        raise BadSampleError("no_assistant", "no assistant turn is trained on: each has weight 0 or is in the prompt")
    read = {*KEYS[format], *MAY_HAVE.get(format, ()), *SYSTEM, "tools"}
    texts = [turn.get("content", "") for turn in turns]
    unused.update(unread(record, read, () if named else ALL_KEYS - read, texts))
    _refuse_half_surrogates(turns, tools)
    return Conversation(turns, tools, untrained, tuple(sorted(unused)))


def _format(record: Mapping[str, Any]) -> str:
    for name, keys in KEYS.items():
        if all(key in record for key in keys):
            return name
    raise BadSampleError(
        "malformed", f"keys {', '.join(record) or 'none'} match no format: {', '.join(KEYS)}; name one by format"
    )


def _messages(record: Mapping[str, Any]) -> list[Message]:
    return _list(record["messages"])


def _conversations(record: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in _list(record["conversations"]):
        if "from" not in turn or "value" not in turn:
            raise BadSampleError("malformed", "a turn of conversations without from and value")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if "role" in others or "content" in others:
            raise BadSampleError("malformed", "a turn of conversations with from and value, and role or content too")
        role = SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadSampleError("unknown_role", f"from {turn['from']!r} is not one of {', '.join(SHAREGPT)}")
        messages.append({"role": role, "content": turn["value"], **others})
    return messages


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    question, more = record["instruction"], record.get("input", "")
    if not isinstance(more, str):
        raise BadSampleError("malformed", f"input of type {type(more).__name__}; it must be text")
    if more and isinstance(question, str):
        question = f"{question}\n\n{more}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _prompt_completion(record: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        own = [{"role": role, "content": value}] if isinstance(value, str) else _list(value)
        for turn in own:
            given = key == "prompt" and turn.get("role") == "assistant" and not any(one in turn for one in TRAIN_KEYS)
            turns.append({**turn, WEIGHT: 0} if given else turn)
    return turns


_READERS = {
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _with_system(record: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """The turns with a record's `system` as the first, unless they already begin with it."""
    found = {key: record[key] for key in SYSTEM if not is_nothing(record.get(key))}
    texts = [_text_of(value) for value in found.values()]
    if not found:
        return turns
    begun = bool(turns) and turns[0].get("role") == "system"
    if begun:
        texts.append(_text_of(turns[0].get("content")))
    if any(text != texts[0] for text in texts):
        names = " and ".join([*found, *(["the turn of role system"] if begun else [])])
        raise BadSampleError("malformed", f"{names} say different things; keep one")
    return turns if begun else [{"role": "system", "content": texts[0]}, *turns]


def _list(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadSampleError("malformed", "its turns are not a list of objects")
    return [{key: inner for key, inner in turn.items() if inner is not None} for turn in value]


def _join_content(turn: Message) -> set[str]:
    """Join content in parts (OpenAI allows it) into one text; returns unused keys of the parts."""
    content = turn.get("content")
    if not isinstance(content, list):
        return set()
    turn["content"] = _text_of(content)
    return unread_of_parts(content)


def _text_of(content: Any) -> Any:
    """The text of content in parts. Parts that are not text are left unchanged, for `_check` to refuse."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else content


def _read_calls(turns: list[Message], tools: Any) -> tuple[list[Message], list[Any] | None]:
    """Turns and tools, with fields parsed that some datasets store as JSON text."""
    try:
        turns = [read_calls(turn) for turn in turns]
        tools = None if isinstance(tools, str) and not tools.strip() else read_tools(tools)
    except ValueError as error:
        raise BadSampleError("malformed", str(error)) from None
    if is_nothing(tools):
        return turns, None
    if not isinstance(tools, list):
        raise BadSampleError("malformed", f"tools of type {type(tools).__name__}; they must be a list")
    return turns, tools


def _answers(turn: Message) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("content", "").strip() or turn.get("tool_calls"))


def _refuse_half_surrogates(turns: list[Message], tools: list[Any] | None) -> None:
    """Refuse lone surrogates, which JSON can spell, as in documents (data/corpus/records.py)."""
    left: list[Any] = [turns, tools]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and (why := half_surrogate(value)):
            raise BadSampleError("malformed", why)


def _check(messages: list[Message]) -> None:
    for message in messages:
        if message.get("role") not in ROLES:
            raise BadSampleError("unknown_role", f"role {message.get('role')!r} is not one of {', '.join(ROLES)}")
        content = message.get("content", "")
        if not isinstance(content, str):
            raise BadSampleError("malformed", f"content of type {type(content).__name__}; it must be text")
        if "content" not in message and not message.get("tool_calls"):
            raise BadSampleError("malformed", f"a turn of role {message['role']} without content")
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in messages):
        raise BadSampleError("empty", "no turn has any text")
    if not any(map(_answers, messages)):
        raise BadSampleError("no_assistant", "no assistant turn has any text")
