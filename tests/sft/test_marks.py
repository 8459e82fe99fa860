"""What `{% generation %}` marks is learnt, whatever it begins with; marks are held against what turns add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megalong.config.sft import Sft
from megalong.sft.formats import BadSampleError, Conversation, Message
from megalong.sft.marks import SENTINELS, has_marks, locate
from megalong.sft.mask import tokenize
from megalong.sft.prepare import prepare
from megalong.sft.template import ChatTemplate
from tests.sft.chats import MARKED, make_tokenizer, write_lines

ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "mistral": "</s>"}
STARTS = {"mistral": " "}


TRIMS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTemplate, ChatTemplate]]:
    """Of each family the one with marks, and without; as Llama 3's, tokenizers leave blanks out of a token's place."""

    def made(folder: Path, family: str, marked: bool) -> ChatTemplate:
        file = make_tokenizer(folder, family, marked) / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": TRIMS}))
        places = AutoTokenizer.from_pretrained(folder)("  a", return_offsets_mapping=True)["offset_mapping"]
        assert places[0][0] != 0
        return ChatTemplate(folder)

    folder = tmp_path_factory.mktemp("templates")
    return {
        family: (made(folder / family, family, True), made(folder / f"{family}-plain", family, False))
        for family in MARKED
    }


def turns(*answers: str) -> list[Message]:
    """A question before each answer, and one more at the end."""
    asked = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": a}] for n, a in enumerate(answers)]
    return [turn for exchange in asked for turn in exchange]


def learnt(template: ChatTemplate, messages: list[Message]) -> str:
    """The text of what is learnt."""
    found = tokenize(template, Conversation(messages))
    return str(template.tokenizer.decode(found.ids[found.targets], clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("family", MARKED)
def test_an_answer_that_begins_with_white_space_is_learnt_and_all_after_it(
    family: str, templates: dict[str, tuple[ChatTemplate, ChatTemplate]]
) -> None:
    """transformers' own mask, seen wrong here, is right on the same answers without blanks ahead of them."""
    answers = ["a1", "    return x", "a3"]
    wanted = "".join(STARTS.get(family, "") + answer + ENDS[family] for answer in answers)
    for template in templates[family]:
        assert learnt(template, turns(*answers)) == wanted
    theirs = templates[family][0].tokenizer
    for spoken, right in ((answers, False), (["a1", "return x", "a3"], family not in STARTS)):
        found = theirs.apply_chat_template(turns(*spoken), return_dict=True, return_assistant_tokens_mask=True)
        ours = tokenize(templates[family][0], Conversation(turns(*spoken)))
        assert (ours.targets.astype(int).tolist() == found["assistant_masks"]) == right


TEXTS = st.text(st.sampled_from(" \n\tab.é数🙂\u200d\u0301\ufdd0\ufdd1"), min_size=1, max_size=8).filter(
    lambda text: text.strip() != ""
)


@settings(max_examples=150, deadline=None)
@given(family=st.sampled_from(sorted(MARKED)), answers=st.lists(TEXTS, min_size=1, max_size=4))
def test_marks_are_what_turns_add_whatever_the_answers_are(
    family: str, answers: list[str], templates: dict[str, tuple[ChatTemplate, ChatTemplate]]
) -> None:
    """Spaces, line breaks, emoji of several tokens, marks that combine with what precedes, and sentinels themselves."""
    marked, plain = (tokenize(template, Conversation(turns(*answers))) for template in templates[family])
    assert marked.ids.tolist() == plain.ids.tolist()
    assert marked.targets.tolist() == plain.targets.tolist()
    wanted = "".join(STARTS.get(family, "") + answer + ENDS[family] for answer in answers)
    assert learnt(templates[family][0], turns(*answers)) == wanted
    assert marked.unmarked == ""


SPELLINGS = {
    "white space control": "{%- generation -%}\n  {{ m.content }}\n  {%- endgeneration -%}",
    "lines of their own": "\n    {% generation %}\n{{ m.content }}\n    {% endgeneration %}\n",
    "kept white space": "\n    {%+ generation +%}\n{{ m.content }}\n    {%+ endgeneration +%}\n",
    "no blanks": "{%generation%}{{ m.content }}{%endgeneration%}",
    "a loop and a condition inside": (
        "{% generation %}{% for c in m.content %}{% if loop.index0 >= 0 %}{{ c }}{% endif %}{% endfor %}"
        "{% endgeneration %}"
    ),
    "in a macro": "{% macro say(x) %}{% generation %}{{ x }}{% endgeneration %}{% endmacro %}{{ say(m.content) }}",
    "one in the other": "{% generation %}{% generation %}{{ m.content[:1] }}{% endgeneration %}{{ m.content[1:] }}"
    "{% endgeneration %}",
    "in pieces": "{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}"
    "{% endgeneration %}",
    "captured": "{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x }}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_marks_writes_transformers_text(
    spelling: str, templates: dict[str, tuple[ChatTemplate, ChatTemplate]]
) -> None:
    """The text is transformers' own, and what stands between the tags is marked."""
    tokenizer = templates["chatml"][0].tokenizer
    template = (
        "  {% for m in messages %}\n{{ '<|im_start|>' + m.role }}|"
        f"{{% if m.role == 'assistant' %}}{SPELLINGS[spelling]}{{% else %}}{{{{ m.content }}}}{{% endif %}}|\n"
        "{% endfor %}"
    )
    assert has_marks(template)

    def render(source: str) -> str:
        return str(tokenizer.apply_chat_template(turns("abc", "de"), tokenize=False, chat_template=source))

    text = render(template)
    spans = locate(template, text, render)
    assert spans is not None
    inside = "\x02".join(text[start:end] for start, end in spans)
    between = {"lines of their own": "abc\n\x02de\n", "kept white space": "\nabc\n    \x02\nde\n    "}
    if spelling == "in pieces":
        assert inside == "a\x02bc\x02d\x02e"
    else:
        assert inside == between.get(spelling, "abc\x02de")


def test_marks_that_cannot_be_followed_are_refused(templates: dict[str, tuple[ChatTemplate, ChatTemplate]]) -> None:
    def broken(answer: str, content: str = " a ") -> str:
        source = f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% endif %}}{{% endfor %}}"

        def render(template: str) -> str:
            return str(tokenizer.apply_chat_template(turns(content), tokenize=False, chat_template=template))

        return str(locate(source, render(source), render))

    tokenizer = templates["chatml"][0].tokenizer
    captured = "{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
    assert broken(captured + "{{ x | trim }}") == "None"
    assert broken(captured + "{{ x | upper }}") != "None"
    assert broken(captured + "{{ x[1:] }}", "abc") == "None"
    assert broken(captured + "{{ x }}", "".join(map("".join, SENTINELS))) == "None"
    assert broken(captured + "{{ x }}", "".join(map("".join, SENTINELS[1:]))) != "None"


def edited(templates: dict[str, tuple[ChatTemplate, ChatTemplate]], folder: Path, template: str) -> ChatTemplate:
    templates["chatml"][0].tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTemplate(folder)


def test_marks_on_somebody_elses_text_are_refused(
    templates: dict[str, tuple[ChatTemplate, ChatTemplate]], tmp_path: Path
) -> None:
    turned = MARKED["chatml"].replace("== 'assistant'", "== 'user'")
    with pytest.raises(BadSampleError, match=r"marks 'q0<\|im_end\|>.*' with {% generation %}, but that is not"):
        tokenize(edited(templates, tmp_path / "turned", turned), Conversation(turns("a1", "a2")))
    header = MARKED["chatml"].replace(
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
    )
    found = tokenize(edited(templates, tmp_path / "header", header), Conversation(turns("a1")))
    assert found.unmarked == ""  # a header is the assistant's, if the template says so


def test_answers_without_marks_are_counted(
    templates: dict[str, tuple[ChatTemplate, ChatTemplate]], tmp_path: Path
) -> None:
    """The template decides, and the report says so: the last answer only; the words of a turn but not its calls."""
    last = MARKED["chatml"].replace("== 'assistant' %}", "== 'assistant' and loop.last %}")
    template = edited(templates, tmp_path / "last", last)
    assert learnt(template, turns("a1", "a2")) == "a2<|im_end|>"
    assert tokenize(template, Conversation(turns("a1"))).unmarked == ""
    assert "writes turn 1 without marking 'a1'" in tokenize(template, Conversation(turns("a1", "a2"))).unmarked
    lines = write_lines(tmp_path / "c.jsonl", [{"messages": turns("b1")}, {"messages": turns("a1", "a2")}])
    report = prepare(Sft(sources=[{"name": "c", "path": str(lines)}]), 200, tmp_path / "last", tmp_path / "i").report
    assert (report["c"]["kept"], report["c"]["counts"]) == (2, {"unmarked": 1})
    assert "line 2: the chat template writes turn 1" in report["c"]["examples"]["unmarked"][0]

    calls = MARKED["chatml"].replace(
        "{% endgeneration %}", "{% endgeneration %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    )
    call = {"tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]}
    spoken = [*turns("a1"), {"role": "user", "content": "q"}, {"role": "assistant", "content": "let me see", **call}]
    found = tokenize(edited(templates, tmp_path / "calls", calls), Conversation(spoken))
    assert found.unmarked == "the chat template writes turn 3 without marking 'look_up'"


def test_blanks_around_a_mark_are_told_apart(
    templates: dict[str, tuple[ChatTemplate, ChatTemplate]], tmp_path: Path
) -> None:
    """Blanks ahead of a mark are not learnt, those at its end are, though the tokenizer gives neither a place."""
    between = MARKED["chatml"].replace("{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}")
    between = between.replace("{% else %}", "{% endgeneration %}{{ '\n<|im_end|>' }}{% else %}", 1)
    template = edited(templates, tmp_path, between)
    answers = ["a1 ", " \n b\n\n", "x", "\ty\t"]
    found = tokenize(template, Conversation(turns(*answers)))
    assert learnt(template, turns(*answers)) == "".join(answers)
    assert found.unmarked == ""
