"""Calls as records spell them, under templates of each kind; held against transformers on the form each is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalong.sft.formats import BadSampleError, Conversation, read_conversation
from megalong.sft.mask import tokenize
from megalong.sft.template import ChatTemplate
from tests.sft.chats import make_tokenizer

TURN = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NESTED = "{% set f = call.function %}"
EITHER = "{% set f = call.function if call.function is defined else call %}"
OBJECTS = {  # templates for objects
    "whole call": "{{ call | tojson }}",
    "tojson": NESTED + '{{ \'{"name": "\' + f.name + \'", "arguments": \' }}{{ f.arguments | tojson }}}',
    "flat or nested": EITHER + "{{ f.name }} {{ f.arguments | tojson }}",
    "indented": NESTED + "{{ f.name }} {{ f.arguments | tojson(indent=2) }}",
    "text or object": NESTED + "{{ f.name }} "
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}",
    "key by key": NESTED + "<{{ f.name }}>{% for k, v in f.arguments | items %}<{{ k }}>{{ v }}{% endfor %}",
    "a text of JSON by itself": NESTED + "{{ f.name }} {{ f.arguments | tojson | tojson }}",
}
TEXTS = {  # templates for texts
    "as it is": NESTED + "{{ f.name }} {{ f.arguments }}",
    "joined": NESTED + "{{ f.name + '```json\n' + f.arguments + '```' }}",
    "text only": NESTED + "{{ f.name }} {% if f.arguments is string %}{{ f.arguments }}{% endif %}",
}
ARGUMENTS = {"city": "Rome", "days": 3, "deep": {"it's": [1.5, None, True, 'a"b']}, "é": "数"}
WIRE = '{"city": "Rome", "days": 3, "deep": {"it\'s": [1.5, null, true, "a\\"b"]}, "é": "数"}'


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate(make_tokenizer(tmp_path_factory.mktemp("tools"), "chatml", marked=False))


def record(*arguments: Any, flat: bool = False, **more: Any) -> dict[str, Any]:
    """A question, calls, an answer of the tool's, an answer."""
    functions = [{"name": f"weather{n}", "arguments": given} for n, given in enumerate(arguments)]
    calls: list[Any] = functions if flat else [{"type": "function", "function": function} for function in functions]
    turns = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    return {"messages": turns, **more}


def written(template: ChatTemplate, kind: str, of: dict[str, Any]) -> str:
    """The text that is trained on."""
    template.tokenizer.chat_template = TURN.replace("CALL", kind)
    return str(template.tokenizer.decode(tokenize(template, read_conversation(of)).ids))


def of_transformers(template: ChatTemplate, kind: str, of: dict[str, Any]) -> str:
    source = TURN.replace("CALL", kind)
    return str(
        template.tokenizer.apply_chat_template(
            of["messages"], tools=of.get("tools"), tokenize=False, chat_template=source
        )
    )


def test_the_wire_form_is_an_object() -> None:
    assert json.loads(WIRE) == ARGUMENTS


@pytest.mark.parametrize("given", [WIRE, ARGUMENTS, WIRE.replace(", ", ",\n  ")], ids=["wire", "object", "spaced"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_templates_for_objects_get_objects(template: ChatTemplate, kind: str, given: Any) -> None:
    flat = kind == "flat or nested"
    wanted = of_transformers(template, OBJECTS[kind], record(ARGUMENTS, {}, flat=flat))
    empties: list[Any] = ["{}", {}, "", " ", None]
    for empty in empties:
        assert written(template, OBJECTS[kind], record(given, empty, flat=flat)) == wanted
    if kind in ("whole call", "tojson", "flat or nested"):
        assert '"arguments": {"city": "Rome"' in wanted or " {" in wanted
        assert '\\"city' not in wanted


@pytest.mark.parametrize("kind", TEXTS)
def test_templates_for_texts_get_texts(template: ChatTemplate, kind: str) -> None:
    """As the record spells them where it has a text; else as JSON, which is not what Python prints of an object."""
    spaced = WIRE.replace(", ", ",\n  ")
    assert written(template, TEXTS[kind], record(ARGUMENTS, {})) == of_transformers(
        template, TEXTS[kind], record(WIRE, "{}")
    )
    assert written(template, TEXTS[kind], record(spaced, "")) == of_transformers(
        template, TEXTS[kind], record(spaced, "{}")
    )


def test_text_that_looks_like_a_wrong_form_decides_nothing(template: ChatTemplate) -> None:
    """The user quotes Python's spelling and JSON within JSON of the very arguments."""
    said = record(WIRE)
    said["messages"][0]["content"] = f"{ARGUMENTS} {json.dumps(WIRE)} {json.dumps(ARGUMENTS)}"
    wanted = said | {"messages": [said["messages"][0], *record(ARGUMENTS)["messages"][1:]]}
    kind = OBJECTS["tojson"]
    assert written(template, kind, said) == of_transformers(template, kind, wanted)


WHOLE = {
    "the list is a text": lambda calls: json.dumps(calls),
    "each is a text": lambda calls: [json.dumps(call) for call in calls],
}


@pytest.mark.parametrize("how", WHOLE)
def test_calls_that_are_texts_are_read(template: ChatTemplate, how: str) -> None:
    given = record(WIRE)
    given["messages"][1]["tool_calls"] = WHOLE[how](given["messages"][1]["tool_calls"])
    kind = OBJECTS["tojson"]
    assert written(template, kind, given) == of_transformers(template, kind, record(ARGUMENTS))


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "enum": ['a"b', "é"]}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
AS_TEXT = {**TOOL, "function": {**TOOL["function"], "parameters": json.dumps(PARAMETERS)}}  # type: ignore[dict-item]
ON_OFFER: dict[str, Any] = {
    "objects": [TOOL],
    "a text": json.dumps([TOOL]),
    "texts": [json.dumps(TOOL)],
    "parameters as a text": [AS_TEXT],
    "texts within a text": json.dumps([json.dumps(AS_TEXT)]),
    "the function as a text": [{**TOOL, "function": json.dumps(TOOL["function"])}],
}


@pytest.mark.parametrize("form", ON_OFFER)
def test_tools_are_objects_however_they_are_written(template: ChatTemplate, form: str) -> None:
    kind = OBJECTS["tojson"]
    wanted = of_transformers(template, kind, record(ARGUMENTS, tools=[TOOL]))
    assert '"parameters": {"type": "object"' in wanted
    assert written(template, kind, record(WIRE, tools=ON_OFFER[form])) == wanted
    flat = {"name": "weather", "parameters": json.dumps(PARAMETERS)}
    wanted = of_transformers(template, kind, record(ARGUMENTS, tools=[flat | {"parameters": PARAMETERS}]))
    assert written(template, kind, record(WIRE, tools=[flat])) == wanted


BAD = {
    '{"city": "Rome"': "the arguments of the call of 'weather0': not valid JSON",
    "{'city': 'Rome'}": "the arguments of the call of 'weather0': not valid JSON",
    '{"a": NaN}': "NaN is not a JSON number",
    '{"a": 1e999}': "1e999 is not a JSON number",
    '{"a": 1, "a": 2}': "a key occurs twice",
    '"Rome"': "the arguments of the call of 'weather0' are not an object",
    "[1]": "the arguments of the call of 'weather0' are not an object",
    "Rome": "not valid JSON",
}


@pytest.mark.parametrize("given", BAD)
def test_arguments_that_are_no_object_are_refused(given: str) -> None:
    with pytest.raises(BadSampleError, match=BAD[given]) as error:
        read_conversation(record(given))
    assert error.value.reason == "malformed"
    for calls, message in {
        "[": "tool_calls: not valid",
        "1": "are not a list$",
        "[1]": "are not a list of",
        '["x"]': "a call: ",
    }.items():
        with pytest.raises(BadSampleError, match=message):
            read_conversation({"messages": [{"role": "assistant", "content": "a", "tool_calls": calls}]})
    with pytest.raises(BadSampleError, match="not an object"):
        read_conversation(record(["a"]))
    with pytest.raises(BadSampleError, match="tools: not valid JSON"):
        read_conversation(record(WIRE, tools="{"))


def test_a_text_of_json_hides_no_added_token(template: ChatTemplate) -> None:
    r"""\u003c is < once it has been read."""
    hidden = '{"city": "\\u003c|im_end|\\u003e"}'
    with pytest.raises(BadSampleError, match=r"role assistant spells the token '<\|im_end\|>'"):
        written(template, OBJECTS["tojson"], record(hidden))


def test_a_template_that_cannot_write_calls_is_refused(template: ChatTemplate) -> None:
    """Rather than to teach an answer without its call, or JSON that is none."""
    said = {
        "": r"writes no arguments of the call of 'weather0'",
        "{{ call.name }}{{ call.arguments }}": r"writes no arguments of the call of 'weather0'",
        NESTED + "{{ f.name }}": r"writes no arguments of the call of 'weather0'",
        NESTED + "{{ f.arguments | tojson }}": r"does not write which functions are called \(weather0, weather1\)",
        "{{ {'of': call} }}": r"does not write the arguments of the call of 'weather0' as a JSON object",
        "{{ raise_exception('no calls') }}": r"the chat template refuses it \(no calls\)",
    }
    for kind, message in said.items():
        with pytest.raises(BadSampleError, match=message):
            written(template, kind, record(WIRE, ARGUMENTS))
    knows = "{% if call.function.name not in ('weather0', 'weather1') %}{{ raise_exception('unknown') }}{% endif %}"
    kind = knows + OBJECTS["tojson"]
    wanted = of_transformers(template, kind, record(ARGUMENTS, {}))
    assert written(template, kind, record(WIRE, {})) == wanted


def test_calls_are_learnt_in_the_form_that_is_written(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, "chatml", marked=False)
    (folder / "chat_template.jinja").write_text(
        TURN.replace("CALL", NESTED + "{{ f.name }} {{ f.arguments | tojson }}")
    )
    template = ChatTemplate(folder)
    found = tokenize(template, read_conversation(record('{"city": "Rome"}')))
    learnt = template.tokenizer.decode(found.ids[found.targets])
    assert learnt == 'weather0 {"city": "Rome"}<|im_end|>Sunny.<|im_end|>'
    assert isinstance(read_conversation(record(WIRE)), Conversation)
