"""Calls of tools as records write them, and as a chat template wants them.

OpenAI's wire form has a call's arguments as a text of JSON, transformers' as an object. Templates are written for one
of the two, and quietly write nonsense of the other:

    record                               template               writes
    "arguments": "{\\"city\\": \\"Rome\\"}"    {{ arguments|tojson }}   "{\\"city\\": \\"Rome\\"}"   JSON within JSON
    "arguments": {"city": "Rome"}        {{ arguments }}          {'city': 'Rome'}           Python, no JSON

So both forms are tried: the object, as servers hand it to templates, then the text. Which one a template writes right
is seen with arguments and a name of our own in place of the record's, which occur nowhere else. A template that writes
neither, or nothing of a call, is no template for that conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

Message = dict[str, Any]
PROBE = "megalong_probe"


def read_calls(message: Message) -> Message:
    """A message whose `tool_calls` are a list of objects and whose arguments can be read.

    Raises:
        ValueError: they are not and cannot.
    """
    if not message.get("tool_calls"):
        return message
    calls = _parsed(message["tool_calls"], "tool_calls")
    if not isinstance(calls, list):
        raise ValueError("tool_calls are no list")
    calls = [_parsed(call, "a call") for call in calls]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(_function(call), Mapping):
            raise ValueError("tool_calls are no list of objects")
        _arguments(_function(call))
    return message | {"tool_calls": calls}


def read_tools(tools: Any) -> Any:
    """The tools on offer, with whatever is a text of JSON read: the list, one of them, its parameters.

    Raises:
        ValueError: a text that is no JSON.
    """
    tools = _parsed(tools, "tools")
    return [_tool(_parsed(tool, "a tool")) for tool in tools] if isinstance(tools, list) else tools


def as_written(messages: list[Message], render: Callable[[list[Message]], str]) -> list[Message]:
    """The messages with arguments in the form that `render` writes right.

    Raises:
        ValueError: neither is, or a call is not written at all.
        Exception: what `render` raises of both forms.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    wrong, refused = [], []
    for name in (f"{PROBE}_name", None):  # a template may know only certain names
        for form in (_object, _text):
            try:
                why = _wrong(messages, form, name, render)
            except Exception as error:
                refused.append(error)
                continue
            if why is None:
                return _in_form(messages, form)
            wrong.append(ValueError(why))
        if wrong:
            break
    raise (wrong or refused)[0]


def _wrong(
    messages: list[Message], form: Callable[[Any], Any], called: str | None, render: Callable[[list[Message]], str]
) -> str | None:
    """What is wrong with the calls that `render` writes of arguments in this form, and all of the name `called`."""
    names: list[str] = []

    def probe(number: int, function: Mapping[str, Any]) -> Any:
        names.append(str(function.get("name")))
        return form({"arguments": {f"{PROBE}{number}x": f"{PROBE}{number}y"}})

    text = render(_with_arguments(messages, probe, called))
    for number, name in enumerate(names):
        key = f"{PROBE}{number}x"
        if key not in text:
            return f"the chat template writes no arguments of the call of {name!r}"
        escaped, printed = (
            f'\\"{key}',
            f"'arguments': '{{\"{key}",
        )  # JSON within JSON, and Python's print of a whole call
        if f"'{key}'" in text or printed in text or (form is _text and escaped in text):
            return (
                f"the chat template writes the arguments of the call of {name!r} as no JSON object; it needs | tojson"
            )
    if called and text.count(called) < len(names):
        return f"the chat template does not write which functions are called ({', '.join(names)})"
    return None


def _in_form(messages: list[Message], form: Callable[[Any], Any]) -> list[Message]:
    return _with_arguments(messages, lambda _, function: form(function))


def _with_arguments(
    messages: list[Message], arguments: Callable[[int, Mapping[str, Any]], Any], name: str | None = None
) -> list[Message]:
    """The messages with each call's arguments, and its name where one is given, put in place of its own."""
    found, number = [], 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = _function(call)
            changed = {**function, "arguments": arguments(number, function)} | ({"name": name} if name else {})
            calls.append({**call, "function": changed} if "function" in call else changed)
            number += 1
        found.append(message | {"tool_calls": calls} if calls else message)
    return found


def _function(call: Mapping[str, Any]) -> Any:
    """What names function and arguments: OpenAI nests it, others write it flat."""
    return call.get("function", call)


def _object(function: Mapping[str, Any]) -> Any:
    return _arguments(function)


def _text(function: Mapping[str, Any]) -> str:
    given = function.get("arguments")
    return given if isinstance(given, str) and given.strip() else json.dumps(_arguments(function), ensure_ascii=False)


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments as an object; none and an empty text are no arguments."""
    given = function.get("arguments")
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    found = _parsed(given, f"the arguments of the call of {function.get('name')!r}")
    if not isinstance(found, Mapping):
        raise ValueError(f"the arguments of the call of {function.get('name')!r} are no object")
    return found


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    if "function" in tool:
        return {**tool, "function": _tool(_parsed(tool["function"], "a tool's function"))}
    return {**tool, "parameters": _parsed(tool["parameters"], "a tool's parameters")} if "parameters" in tool else tool


def _parsed(value: Any, what: str) -> Any:
    """What a text of JSON says; whatever is no text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_once, parse_constant=_no_json, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not valid JSON ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if number - number == 0 else _no_json(digits)
