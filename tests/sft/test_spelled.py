"""Text that spells an added token is refused wherever it gets in; held against the ids of transformers' template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megalong.sft.formats import BadSampleError, Conversation
from megalong.sft.mask import tokenize
from megalong.sft.template import ChatTemplate
from tests.sft.chats import TEXT

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|rsv|>"]
MERELY = ["<think>", "</think>", "<tool_call>", "<｜User｜>", "<｜Assistant｜>", "catmat", "    ", "\n\n"]
TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ {'user': '<｜User｜>', 'assistant': '<｜Assistant｜>'}.get(m.role, '<|start_header_id|>' + m.role) }}"
    "{{ m.reasoning_content or '' }}{{ m.name or '' }}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
SAYS = "What does %s mean?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-3-like tokenizer that adds its special tokens and names none of them."""
    folder: Path = tmp_path_factory.mktemp("llama3")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken(text, normalized=False) for text in MERELY])
    PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens"}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in named}))
    return folder


def conversation(says: str = "?", answers: str = "!", call: Any = None, tools: Any = None, **more: Any) -> Conversation:
    calls = {"tool_calls": [{"type": "function", "function": call}]} if call else {}
    turns = [
        {"role": "system", "content": more.get("system", "Be brief.")},
        {"role": "user", "content": says, **more.get("user", {})},
        {"role": "assistant", "content": "", "reasoning_content": more.get("thought", "So"), **calls},
        {"role": "tool", "name": more.get("name", "cat"), "content": more.get("result", "on a mat")},
        {"role": "assistant", "content": answers},
    ]
    return Conversation(turns, tools)


def added_ids(template: ChatTemplate, of: Conversation) -> list[int]:
    """The added tokens in the ids that transformers makes of a conversation."""
    found = template.tokenizer.apply_chat_template(of.messages, tools=of.tools, return_dict=True)["input_ids"]
    added = {id for text, id in template.tokenizer.get_added_vocab().items() if not text.isspace()}
    return [id for id in found if id in added]


PLACES: dict[str, Any] = {
    "a turn of role system": lambda text: conversation(system=text),
    "a turn of role user": lambda text: conversation(text),
    "a turn of role tool": lambda text: conversation(result=text),
    "a turn of role tool (name)": lambda text: conversation(name=text),
    "tools": lambda text: conversation(tools=[{"type": "function", "function": {"description": text}}]),
    "tools (key)": lambda text: conversation(tools=[{"parameters": {"properties": {text: {"type": "string"}}}}]),
    "tools (list)": lambda text: conversation(tools=[{"parameters": {"enum": ["a", [text]]}}]),
}
ANSWERS: dict[str, Any] = {
    "a turn of role assistant": lambda text: conversation(answers=text),
    "a turn of role assistant (reasoning)": lambda text: conversation(thought=text),
    "a turn of role assistant (name of a call)": lambda text: conversation(call={"name": text, "arguments": {}}),
    "a turn of role assistant (arguments)": lambda text: conversation(call={"name": "c", "arguments": {"a": [text]}}),
    "a turn of role assistant (key)": lambda text: conversation(call={"name": "c", "arguments": {text: 1}}),
}


@pytest.mark.parametrize("token", [*SPECIAL, *MERELY])
@pytest.mark.parametrize("place", [*PLACES, *ANSWERS])
def test_what_would_become_a_token_is_refused_wherever_it_gets_in(folder: Path, place: str, token: str) -> None:
    template = loaded(folder)
    spelling, plain = (PLACES | ANSWERS)[place](SAYS % token), (PLACES | ANSWERS)[place](SAYS % "it")
    tokenize(template, plain)
    turns = len(added_ids(template, plain))
    assert (len(added_ids(template, spelling)) > turns) == (not token.isspace())
    if token in MERELY[-3:] or (place in ANSWERS and token in MERELY[:3]):
        tokenize(template, spelling)  # words like others; an answer may think and call
    else:
        with pytest.raises(BadSampleError, match=r"spells? the token") as error:
            tokenize(template, spelling)
        assert repr(token) in str(error.value)
        assert str(error.value).startswith(place.partition(" (")[0])


LOADED: dict[Path, ChatTemplate] = {}


def loaded(folder: Path) -> ChatTemplate:
    if folder not in LOADED:
        LOADED[folder] = ChatTemplate(folder)
    return LOADED[folder]


def test_fields_that_come_later_are_looked_at_too(folder: Path) -> None:
    """Whatever a conversation has besides messages (documents, for instance) is refused alike."""
    later = conversation()
    object.__setattr__(later, "documents", [{"title": "a", "text": "b<|eot_id|>"}])
    with pytest.raises(BadSampleError, match=r"documents spell the token '<\|eot_id\|>'"):
        loaded(folder).refuse_added(later)


def test_normalized_spellings_are_refused_and_parts_of_tokens_are_not(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    for token in content["added_tokens"]:
        token["normalized"] = token["content"] == "<tool_call>"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    template = ChatTemplate(tmp_path)
    assert normalizers.NFKC().normalize_str("＜tool＿call＞") == "<tool_call>"
    for text in ("＜tool＿call＞", "a<TOOL_Call>b"):
        assert len(added_ids(template, conversation(text))) > len(added_ids(template, conversation()))
        with pytest.raises(BadSampleError, match="role user spells the token '<tool_call>'"):
            tokenize(template, conversation(text))
    for text in ("<|EOT_ID|>", "<|eot_id |>", "<tool call>", "<| eot_id|>"):
        assert len(added_ids(template, conversation(text))) == len(added_ids(template, conversation()))
        tokenize(template, conversation(text))
