"""Masks against transformers' own, for three families; truncation ends with what is learnt."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megalong.sft.formats import BadSampleError, Conversation, read_conversation
from megalong.sft.mask import shorten, tokenize
from megalong.sft.template import ChatTemplate
from tests.sft.chats import MARKED, chats, make_tokenizer


@pytest.mark.parametrize("family", MARKED)
def test_both_ways_give_transformers_own_mask(family: str, tmp_path: Path) -> None:
    marked = make_tokenizer(tmp_path / "marked", family)
    plain = ChatTemplate(make_tokenizer(tmp_path / "plain", family, marked=False))
    theirs = AutoTokenizer.from_pretrained(marked)
    template = ChatTemplate(marked)
    assert (template.marked, plain.marked) == (True, False)
    for messages in chats(12, system=family != "mistral"):
        wanted = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for ours in (tokenize(plain, Conversation(messages)), tokenize(template, Conversation(messages))):
            assert ours.ids.tolist() == wanted["input_ids"]
            assert ours.targets.astype(int).tolist() == wanted["assistant_masks"]
            assert 0 < ours.targets.sum() < len(ours.targets)
            assert ours.unmarked == ""


@pytest.mark.parametrize("family", MARKED)
def test_what_is_cut_ends_with_an_answer(family: str, tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(tmp_path, family, marked=False))
    for messages in chats(9):
        whole = tokenize(template, Conversation(messages))
        first = tokenize(template, Conversation(messages[:2]))
        for limit in range(len(first.ids), len(whole.ids) + 1):
            short = shorten(template, Conversation(messages), limit)
            assert len(short.ids) <= limit
            assert len(short.ids) >= len(first.ids)
            assert short.ids.tolist() == whole.ids[: len(short.ids)].tolist()
            assert np.flatnonzero(short.targets)[-1] >= len(short.ids) - 2  # ChatML writes a new line behind a turn
        begin = int(np.flatnonzero(first.targets)[0])
        cut = shorten(template, Conversation(messages), begin + 1)
        assert (len(cut.ids), bool(cut.targets[-1])) == (begin + 1, True)
        with pytest.raises(BadSampleError, match="no answer begins"):
            shorten(template, Conversation(messages), begin)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(tmp_path, "chatml", marked=False))
    template.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{{ '!' if loop.last }}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(BadSampleError, match="writes turn 1 differently"):
        tokenize(template, Conversation(chats(2)[1]))


def test_an_answer_without_a_question_needs_marks(tmp_path: Path) -> None:
    conversation = Conversation([{"role": "assistant", "content": "Hello."}, *chats(1)[0]])
    plain = ChatTemplate(make_tokenizer(tmp_path / "plain", "chatml", marked=False))
    with pytest.raises(BadSampleError, match=r"begins with the assistant's turn; mark its text .* generation"):
        tokenize(plain, conversation)
    assert tokenize(ChatTemplate(make_tokenizer(tmp_path / "marked", "chatml")), conversation).targets.any()


def test_content_that_spells_a_special_token_is_refused(tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(tmp_path, "chatml"))
    messages = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(BadSampleError, match=r"spells the token '<\|im_end\|>'"):
        tokenize(template, Conversation(messages))


def test_calls_of_tools_are_learnt_and_their_answers_are_not(tmp_path: Path) -> None:
    marked = ChatTemplate(make_tokenizer(tmp_path / "marked", "chatml"))
    plain = ChatTemplate(make_tokenizer(tmp_path / "plain", "chatml", marked=False))
    head = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    call = "{{ (m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') + '<|im_end|>' }}"
    for template in (marked, plain):
        written = template.tokenizer.chat_template
        template.tokenizer.chat_template = head + written.replace("{{ m['content'] + '<|im_end|>' }}", call)
    calls = [{"type": "function", "function": {"name": "cat", "arguments": {"mat": 1}}}]
    record = {
        "tools": [{"type": "function", "function": {"name": "cat", "description": "sat", "parameters": {}}}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "on a mat"},
            {"role": "assistant", "content": "There."},
        ],
    }
    conversation = read_conversation(record)
    found = tokenize(plain, conversation)
    assert found.ids.tolist() == tokenize(marked, conversation).ids.tolist()
    assert found.targets.tolist() == tokenize(marked, conversation).targets.tolist()
    learnt = plain.tokenizer.decode(found.ids[found.targets])
    assert learnt.startswith('[{"')
    assert learnt.endswith("<|im_end|>There.<|im_end|>")
    assert "on a mat" not in learnt
    assert '"sat"' not in learnt
