"""Four ways to write a conversation down, read as one: messages with a role and content, and the tools on offer.

    messages           {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
    conversations      {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}   (ShareGPT)
    alpaca             {"instruction": …, "input": …, "output": …}
    prompt_completion  {"prompt": …, "completion": …}, each a text or a list of messages

A record's format is found by its keys unless the source names one. What cannot be read says which rule it falls under.

Besides these keys `tools` are read, and `system` as the first turn. A turn keeps its other keys for the chat template,
but for those that say whether it is learnt: `weight` (0 or 1), `train`, `training`, `loss` (true or false). An answer
within a `prompt` is given, not learnt, unless it says so. No key is dropped without a word: see keys.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalong.data.corpus.records import half_surrogate
from megalong.sft.errors import BadSampleError as BadSampleError
from megalong.sft.keys import LEARNING, SYSTEM, WEIGHT, is_nothing, take_learnt, unread, unread_of_parts, without
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
MAY_HAVE = {  # besides: what Alpaca's `text` says, its other keys say too
    "alpaca": ("input", "text"),
}
ALL_KEYS = {*(key for keys in KEYS.values() for key in keys), "input"}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them; `tools` are the functions the assistant may call.

    Attributes:
        unlearnt: numbers of the assistant's messages that are not learnt.
        unread: keys that nothing reads and that are not known to be harmless.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    unlearnt: frozenset[int] = frozenset()
    unread: tuple[str, ...] = ()


def read_conversation(record: Any, format: str = "auto", ignore: Sequence[str] = ()) -> Conversation:
    """A record of any format as a conversation whose roles and contents are known to be usable.

    Args:
        ignore: keys of the record and of its turns that are left out.

    Raises:
        BadSampleError: it is not, or one of its keys changes what is said or learnt and is not read.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError("malformed", f"a {type(record).__name__} and not an object, {{…}}")
    # Parquet gives every record and every turn every key; those that are null were never written.
    record = {key: value for key, value in without(record, ignore).items() if value is not None}
    named, format = format != "auto", _format(record) if format == "auto" else format
    missing = [key for key in KEYS[format] if key not in record]
    if missing:
        raise BadSampleError("malformed", f"no key {missing[0]!r}, which {format} has (there are: {', '.join(record)})")
    turns = _with_system(record, _READERS[format](record))
    told = {key for turn in turns for key in _joined(turn)}
    _check(turns)
    turns, tools = _read_calls(turns, record.get("tools"))
    learnt = take_learnt(turns)
    unlearnt = frozenset(n for n, one in enumerate(learnt) if one is False and turns[n]["role"] == "assistant")
    if not any(_answers(turn) for n, turn in enumerate(turns) if n not in unlearnt):
        raise BadSampleError("no_assistant", "no answer of the assistant's is learnt: each has weight 0, or is given")
    read = {*KEYS[format], *MAY_HAVE.get(format, ()), *SYSTEM, "tools"}
    texts = [turn.get("content", "") for turn in turns]
    told.update(unread(record, read, () if named else ALL_KEYS - read, texts))
    _refuse_half_surrogates(turns, tools)
    return Conversation(turns, tools, unlearnt, tuple(sorted(told)))


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
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if "role" in others or "content" in others:
            raise BadSampleError("malformed", "a turn of conversations with from and value, and role or content too")
        role = SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadSampleError("unknown_role", f"from {turn['from']!r} is none of {', '.join(SHAREGPT)}")
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
            given = key == "prompt" and turn.get("role") == "assistant" and not any(one in turn for one in LEARNING)
            turns.append({**turn, WEIGHT: 0} if given else turn)
    return turns


_READERS = {
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _with_system(record: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """The turns behind the one that a record's `system` is, unless they begin with the same."""
    found = {key: record[key] for key in SYSTEM if not is_nothing(record.get(key))}
    texts = [_text_of(value) for value in found.values()]
    if not found:
        return turns
    begun = bool(turns) and turns[0].get("role") == "system"
    if begun:
        texts.append(_text_of(turns[0].get("content")))
    if any(text != texts[0] for text in texts):
        names = " and ".join([*found, *(["the turn of role system"] if begun else [])])
        raise BadSampleError("malformed", f"{names} say different things; leave one")
    return turns if begun else [{"role": "system", "content": texts[0]}, *turns]


def _list(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadSampleError("malformed", "its turns are no list of objects")
    return [{key: inner for key, inner in turn.items() if inner is not None} for turn in value]


def _joined(turn: Message) -> set[str]:
    """Make content in parts, as OpenAI writes it too, one text; returns keys of the parts that nothing reads."""
    content = turn.get("content")
    if not isinstance(content, list):
        return set()
    turn["content"] = _text_of(content)
    return unread_of_parts(content)


def _text_of(content: Any) -> Any:
    """The text of content in parts; anything but texts is left as it is, for `_check` to refuse."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else content


def _read_calls(turns: list[Message], tools: Any) -> tuple[list[Message], list[Any] | None]:
    """Turns and tools with what some datasets keep as JSON read."""
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
    """JSON can spell half of a surrogate pair, which is no text: as in a document (data/corpus/records.py)."""
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
            raise BadSampleError("unknown_role", f"role {message.get('role')!r} is none of {', '.join(ROLES)}")
        content = message.get("content", "")
        if not isinstance(content, str):
            raise BadSampleError("malformed", f"content of type {type(content).__name__}; it must be text")
        if "content" not in message and not message.get("tool_calls"):
            raise BadSampleError("malformed", f"a turn of role {message['role']} without content")
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in messages):
        raise BadSampleError("empty", "no turn has any text")
    if not any(map(_answers, messages)):
        raise BadSampleError("no_assistant", "no turn of the assistant's has any text")
