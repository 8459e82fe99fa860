"""No key of a record is dropped without a word: what is used, what is refused, what is told; and what is not learnt.

The reference for what is used is transformers, given the messages by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megalong.config.sft import Sft
from megalong.errors import UserError
from megalong.sft.errors import BadSampleError
from megalong.sft.formats import read_conversation
from megalong.sft.mask import tokenize
from megalong.sft.prepare import Prepared, prepare, report_lines
from megalong.sft.template import ChatTemplate
from megalong.sft.written import unwritten
from tests.sft.chats import MARKED, PLAIN, make_tokenizer, write_lines

ASK, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It was the cat."}
BRIEF = {"role": "system", "content": "Be brief."}
TURNS = [ASK, ANSWER]
RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "conversations": {
        "conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    },
    "alpaca": {"instruction": ASK["content"], "output": ANSWER["content"]},
    "prompt_completion": {"prompt": ASK["content"], "completion": ANSWER["content"]},
}
TOOL = {"type": "function", "function": {"name": "cat", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "cat", "arguments": {"mat": 1}}}
# Writes tools, calls and reasoning; of earlier turns it leaves the reasoning out.
RICH = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] and loop.last %}{{ '(' + m['reasoning_content'] + ')' }}{% endif %}"
    "{{ (m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("keys") / "tokenizer", "chatml")


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    return ChatTemplate(folder)


def prepared(folder: Path, to: Path, source: dict[str, Any] | None = None, **rules: Any) -> Prepared:
    sft = Sft(sources=[{"name": "chats", "path": str(to), **(source or {})}], **rules)
    return prepare(sft, 200, folder, to.parent / "index")


def read(template: ChatTemplate, record: dict[str, Any]) -> set[str]:
    """Keys that are told."""
    conversation = read_conversation(record)
    return {*conversation.unread, *unwritten(template.text, conversation.messages, conversation.tools)}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("kind", RECORDS)
def test_the_system_of_a_record_is_its_first_turn(kind: str, key: str, folder: Path, template: ChatTemplate) -> None:
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [BRIEF, *TURNS], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for record in (RECORDS[kind], {"messages": [BRIEF, *TURNS]}):  # the second says it twice
        found = tokenize(template, read_conversation({**record, key: BRIEF["content"]}))
        assert found.ids.tolist() == wanted["input_ids"]
        assert found.targets.tolist() == [bool(one) for one in wanted["assistant_masks"]]


def test_two_systems_are_refused() -> None:
    both = {"messages": [BRIEF, *TURNS], "system": "Be long."}
    with pytest.raises(BadSampleError, match="system and the turn of role system say different things; keep one"):
        read_conversation(both)
    with pytest.raises(BadSampleError, match="system and system_prompt say different things"):
        read_conversation({"messages": TURNS, "system": "Be long.", "system_prompt": "Be brief."})
    with pytest.raises(BadSampleError, match="content of type int; it must be text"):
        read_conversation({"messages": TURNS, "system": 7})


SPEAKING: dict[str, Any] = {
    "documents": [{"title": "a", "text": "b"}],
    "chat_template_kwargs": {"enable_thinking": False},
    "chat_template": "{{ messages }}",
    "functions": [{"name": "cat"}],
    "history": [["a", "b"]],
    "context": "It sat on a mat.",
    "images": ["a.png"],
    "prefix": "Well",
    "name": "Ann",
    "reasoning_content": "hm",
    "thinking": "hm",
    "weight": 0.5,
    "train": False,
    "loss": 0,
    "mask": [0, 1],
    "labels": [1, 2],
    "loss_mask": [0, 1],
    "instruction": "Another question.",
    "completion": "Another answer.",
}


@pytest.mark.parametrize("key", SPEAKING)
def test_a_key_that_changes_what_is_said_or_learnt_is_refused(key: str) -> None:
    for kind in RECORDS:
        if key in RECORDS[kind]:
            continue
        with pytest.raises(BadSampleError, match=rf"key '{key}' (changes what|selects what|is of another)") as caught:
            read_conversation({**RECORDS[kind], key: SPEAKING[key]})
        assert caught.value.reason == "malformed"
        assert read_conversation({**RECORDS[kind], key: SPEAKING[key]}, ignore=[key]).unread == ()
        assert read_conversation({**RECORDS[kind], key: None}).unread == ()


def test_what_another_format_repeats_is_no_matter() -> None:
    """UltraChat has the first question beside the turns; UltraFeedback rows whose other columns are null."""
    assert read_conversation({"messages": TURNS, "prompt": f"{ASK['content']} ", "conversations": None}).unread == ()
    assert read_conversation({"messages": None, **RECORDS["alpaca"], "text": "Below is"}).messages == TURNS
    assert read_conversation({**RECORDS["alpaca"], "prompt": "Other"}, "alpaca").unread == ("prompt",)


def test_other_keys_are_counted_and_told_once_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{**ASK, "mood": "calm", "id": 3}, {**ANSWER, "refusal": None, "prefix": False, "annotations": []}]
    records = [{"messages": turns, "id": n, "source": "x", "Foo": n + 1, "empty": ""} for n in range(3)]
    (tmp_path / "chats").mkdir()
    for name in ("a", "b", "c"):
        write_lines(tmp_path / "chats" / f"{name}.jsonl", records)
    write_lines(tmp_path / "chats" / "d.jsonl", [{"messages": TURNS, "bar": [0]}, {"messages": TURNS}])
    found = prepared(folder, tmp_path / "chats", deduplicate=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unused keys" in line]
    start, alike = "megalong: sft.sources: chats: ", "unused keys"
    assert lines == [
        f"{start}{tmp_path}/chats/a.jsonl and 2 more files: {alike}: Foo (9 records), mood (9)",
        f"{start}{tmp_path}/chats/d.jsonl: {alike}: bar (1 record)",
    ]
    assert found.report["chats"]["unread"] == {"Foo": 9, "mood": 9, "bar": 1}
    assert report_lines(found.report)[0].endswith(f"; {alike}: Foo (9 records), mood (9), bar (1)")


TURN_KEYS: dict[str, Any] = {
    "name": "Ann",
    "reasoning_content": "hm",
    "thinking": [{"type": "text", "text": "hm"}],
    "prefix": True,
    "refusal": "No.",
    "audio": {"id": "x"},
    "tool_calls": [CALL],
}


@pytest.mark.parametrize("key", TURN_KEYS)
def test_a_key_of_a_turn_that_the_template_does_not_write_is_refused(key: str, template: ChatTemplate) -> None:
    record = {"messages": [ASK, {**ANSWER, key: TURN_KEYS[key]}]}
    with pytest.raises(BadSampleError, match=rf"does not write ('{key}' of a turn|call of a tool in turn 1)"):
        read(template, record)
    assert read_conversation(record, ignore=[key]).messages == TURNS


def test_what_a_template_writes_is_used(tmp_path: Path) -> None:
    rich = make_tokenizer(tmp_path / "rich", "chatml")
    (rich / "chat_template.jinja").write_text(RICH)
    template, theirs = ChatTemplate(rich), AutoTokenizer.from_pretrained(rich)
    turns = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "on a mat", "name": "cat", "tool_call_id": "7"},
        {**ANSWER, "reasoning_content": "so", "mood": "calm"},
    ]
    assert read(template, {"messages": turns, "tools": [TOOL]}) == {"mood"}
    conversation = read_conversation({"messages": turns, "tools": [TOOL]})
    text = template.text(conversation.messages, conversation.tools)
    assert text == theirs.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert '"cat"' in text
    assert "(so)" in text


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"messages": TURNS, "tools": [TOOL]}, "tool 0"),
        ({"messages": TURNS, "tools": '[{"name": "cat"}]'}, "tool 0"),
        (
            {"messages": [{"role": "developer", "content": "Be kind."}, *TURNS]},
            "the content of turn 0, of role developer",
        ),
        ({"messages": TURNS, "system": "Be brief."}, "the content of turn 0, of role system"),
        ({"messages": [*TURNS, {"role": "tool", "content": "x"}, ANSWER]}, "the content of turn 2, of role tool"),
    ],
)
def test_what_a_template_leaves_out_is_refused(record: dict[str, Any], what: str, folder: Path) -> None:
    """Many templates know of the user and the assistant alone, and pass over the rest without a word."""
    template = ChatTemplate(folder)
    template.tokenizer.chat_template = PLAIN["chatml"].replace(
        "in messages", "in messages if m.role in 'userassistant'"
    )
    with pytest.raises(BadSampleError, match=f"the chat template does not write {what}; give one that does"):
        read(template, record)
    assert read(template, {"messages": TURNS, "tools": ""}) == set()


FOUR = [ASK, ANSWER, {"role": "user", "content": "And why?"}, {"role": "assistant", "content": "It sat on a mat."}]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("family", MARKED)
def test_a_turn_of_weight_0_is_read_and_not_learnt(family: str, marked: bool, tmp_path: Path) -> None:
    """Against transformers' masks of the conversation and of its first half: the rest is the second answer's."""
    theirs = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "theirs", family))
    template = ChatTemplate(make_tokenizer(tmp_path / "ours", family, marked))
    found = theirs.apply_chat_template(FOUR, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    half = theirs.apply_chat_template(FOUR[:2], tokenize=True, return_dict=True)["input_ids"]
    whole = np.array(found["assistant_masks"], bool)
    second = whole & (np.arange(len(whole)) >= len(half))
    for weights, wanted in (((0, 1), second), ((0.0, None), second), ((1, 0), whole & ~second), ((1, 1), whole)):
        turns = [dict(turn) for turn in FOUR]
        turns[1]["weight"], turns[3]["weight"] = weights
        ours = tokenize(template, read_conversation({"messages": turns}))
        assert ours.ids.tolist() == found["input_ids"]
        assert ours.targets.tolist() == wanted.tolist()
    for key in ("train", "training", "loss"):
        turns = [FOUR[0], {**FOUR[1], key: False}, FOUR[2], {**FOUR[3], key: True}]
        assert tokenize(template, read_conversation({"messages": turns})).targets.tolist() == second.tolist()
    # An answer within the prompt is given.
    split = {"prompt": FOUR[:3], "completion": FOUR[3]["content"]}
    assert tokenize(template, read_conversation(split)).targets.tolist() == second.tolist()
    split["prompt"] = [FOUR[0], {**FOUR[1], "weight": 1}, FOUR[2]]
    assert tokenize(template, read_conversation(split)).targets.tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({**ANSWER, "weight": 0.5}, "weight 0.5 of a turn; write 0"),
        ({**ANSWER, "weight": -1}, "weight -1 of a turn"),
        ({**ANSWER, "weight": True}, "weight True of a turn"),
        ({**ANSWER, "weight": "0"}, "weight '0' of a turn"),
        ({**ANSWER, "weight": float("nan")}, "weight nan of a turn"),
        ({**ANSWER, "train": 1}, "train 1 of a turn; write false"),
        ({**ANSWER, "weight": 0, "train": True}, "weight and train of a turn contradict"),
        ({**ANSWER, "mask": False}, "key 'mask' of a turn is not read; write weight: 0"),
        ({**ANSWER, "labels": [1]}, "key 'labels' of a turn is not read"),
        ({**ASK, "weight": 1}, "weight of a turn of role 'user' asks to train on it"),
        ({"role": "assistant", "content": [{"type": "text", "text": "x", "weight": 0}]}, "key 'weight' of a part"),
    ],
)
def test_another_weight_is_refused_by_name(turn: dict[str, Any], why: str) -> None:
    with pytest.raises(BadSampleError, match=why):
        read_conversation({"messages": [*FOUR, turn]})
    assert read_conversation({"messages": [{**ASK, "weight": 0}, ANSWER]}).untrained == frozenset()


def test_weights_of_sharegpt_turns_count_and_nothing_learnt_is_no_answer(folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    with pytest.raises(BadSampleError, match="no assistant turn is trained on") as caught:
        read_conversation({"conversations": turns})
    assert caught.value.reason == "no_assistant"
    # The same text, learnt elsewhere, is no duplicate.
    other = [FOUR[0], {**FOUR[1], "weight": 0}, *FOUR[2:]]
    lines = write_lines(tmp_path / "chats.jsonl", [{"messages": FOUR}, {"messages": other}, {"messages": other}])
    found = prepared(folder, lines)
    assert found.report["chats"]["counts"] == {"duplicate": 1}
    assert found.targets[: found.ends[0]].sum() > found.targets[found.ends[0] :].sum() > 0
    with pytest.raises(UserError, match=r"line 1: weight 2 of a turn; write 0 .*; fix it, or write sft\.on_malformed"):
        prepared(folder, write_lines(tmp_path / "w.jsonl", [{"messages": [ASK, {**ANSWER, "weight": 2}]}]))
