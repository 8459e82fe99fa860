"""Tool calls as records write them, and as a chat template expects them.

The arguments of a call are JSON text in OpenAI's API, and an object in transformers. A template is written for one of
the two and silently writes nonsense for the other:

    record                               template               writes
    "arguments": "{\\"city\\": \\"Rome\\"}"    {{ arguments|tojson }}   "{\\"city\\": \\"Rome\\"}"   JSON within JSON
    "arguments": {"city": "Rome"}        {{ arguments }}          {'city': 'Rome'}           Python, no JSON

Both forms are therefore tried: the object, as servers pass it to templates, then the text. The test replaces the
record's arguments and function name with unique ones and searches the rendered text for them. A conversation is refused
if its template writes neither form correctly, or does not write a call at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

Message = dict[str, Any]
PROBE = "megalong_probe"


def read_calls(message: Message) -> Message:
    """The message with `tool_calls` as a list of objects, whose arguments can be parsed.

    Raises:
        ValueError: `tool_calls` or arguments cannot be parsed.
    """
    if not message.get("tool_calls"):
        return message
    calls = _parsed(message["tool_calls"], "tool_calls")
    if not isinstance(calls, list):
        raise ValueError("tool_calls are not a list")
    calls = [_parsed(call, "a call") for call in calls]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(_function(call), Mapping):
            raise ValueError("tool_calls are not a list of objects")
        _arguments(_function(call))
    return message | {"tool_calls": calls}


def read_tools(tools: Any) -> Any:
    """The tools on offer. JSON text is parsed, whether it is the whole list, one tool, or its parameters.

    Raises:
        ValueError: a text is not JSON.
    """
    tools = _parsed(tools, "tools")
    return [_tool(_parsed(tool, "a tool")) for tool in tools] if isinstance(tools, list) else tools


def as_written(messages: list[Message], render: Callable[[list[Message]], str]) -> list[Message]:
    """The messages with arguments in the form that `render` writes correctly.

    Raises:
        ValueError: neither form is written correctly, or a call is not written at all.
        Exception: what `render` raises for both forms.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    wrong, refused = [], []
    for name in (f"{PROBE}_name", None):  # None: keep the names, because a template may accept only certain ones
        for form in (_object, _text):
            try:
                why = _problem(messages, form, name, render)
            except Exception as error:
                refused.append(error)
                continue
            if why is None:
                return _in_form(messages, form)
            wrong.append(ValueError(why))
        if wrong:
            break
    raise (wrong or refused)[0]


def _problem(
    messages: list[Message], form: Callable[[Any], Any], called: str | None, render: Callable[[list[Message]], str]
) -> str | None:
    """What is wrong with the calls that `render` writes, with arguments in this form and `called` as every name."""
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
        )  # JSON within JSON, and Python's repr of a whole call
        if f"'{key}'" in text or printed in text or (form is _text and escaped in text):
            return (
                f"the chat template does not write the arguments of the call of {name!r} as a JSON object; it needs "
                "| tojson"
            )
    if called and text.count(called) < len(names):
        return f"the chat template does not write which functions are called ({', '.join(names)})"
    return None


def _in_form(messages: list[Message], form: Callable[[Any], Any]) -> list[Message]:
    return _with_arguments(messages, lambda _, function: form(function))


def _with_arguments(
    messages: list[Message], arguments: Callable[[int, Mapping[str, Any]], Any], name: str | None = None
) -> list[Message]:
    """The messages with the arguments of each call replaced, and its name if one is given."""
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
    """The object with a call's name and arguments: OpenAI nests it, others write it flat."""
    return call.get("function", call)


def _object(function: Mapping[str, Any]) -> Any:
    return _arguments(function)


def _text(function: Mapping[str, Any]) -> str:
    given = function.get("arguments")
    return given if isinstance(given, str) and given.strip() else json.dumps(_arguments(function), ensure_ascii=False)


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments as an object; empty if they are missing or an empty text."""
    given = function.get("arguments")
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    found = _parsed(given, f"the arguments of the call of {function.get('name')!r}")
    if not isinstance(found, Mapping):
        raise ValueError(f"the arguments of the call of {function.get('name')!r} are not an object")
    return found


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    if "function" in tool:
        return {**tool, "function": _tool(_parsed(tool["function"], "a tool's function"))}
    return {**tool, "parameters": _parsed(tool["parameters"], "a tool's parameters")} if "parameters" in tool else tool


def _parsed(value: Any, what: str) -> Any:
    """The value of JSON text; anything that is not text is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(
            value, object_pairs_hook=_refuse_repeated, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not valid JSON ({error})") from None


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if number - number == 0 else _refuse_constant(digits)
