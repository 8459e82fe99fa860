"""`megalong generate` against `transformers.generate`, and what it says to a user's mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megalong.errors import UserError
from megalong.evaluation.generate import Sampling, choose_token, end_ids, generate
from megalong.sft.template import ChatTemplate
from tests.llama import VOCABULARY, make_llama
from tests.ranks import megalong

NEW, PROMPT = 200, 70  # the prompt is longer than what the model was trained for
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWED = {"model_type": "ministral", "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}


def greedy_of_transformers(folder, prompt, count):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "kind", ["yarn", *(pytest.param(one, marks=pytest.mark.slow) for one in ("plain", "tied", "windowed"))]
)
def test_greedy_is_that_of_transformers(kind, tmp_path, pool):
    overrides = {"rope_parameters": YARN} if kind == "yarn" else {}
    folder = make_llama(tmp_path / "hf", tie_word_embeddings=kind == "tied", **overrides)
    if kind == "windowed":
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | WINDOWED))
    prompt = np.random.default_rng(0).integers(2, VOCABULARY, PROMPT).tolist()
    theirs = greedy_of_transformers(folder, prompt, NEW)
    assert len(set(theirs)) > 20  # no loop that any model would stay in
    jobs = [(prompt, NEW, 4096), (prompt, NEW, 16), (prompt, 20, 1), (prompt[:1], 20, 3)]
    (ours,) = pool.run(1, "tests.evaluation.workers:continuations", folder, jobs)
    assert ours[0] == theirs
    assert ours[1] == theirs
    assert ours[2] == theirs[:20]
    assert ours[3] == greedy_of_transformers(folder, prompt[:1], 20)


def test_sampling_has_the_distribution_of_transformers():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    warped = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(12)(None, logits[None] / 1.3))
    expected = warped.softmax(-1)[0]
    generator, sampling = torch.Generator().manual_seed(1), Sampling(1.3, top_p=0.8, top_k=12)
    drawn = torch.tensor([choose_token(logits, sampling, generator) for _ in range(20000)]).bincount(minlength=40)
    assert ((drawn > 0) == (expected > 0)).all()
    assert (drawn / 20000 - expected).abs().max() < 0.015  # four standard deviations


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model whose tokenizer knows words and has a chat template."""
    folder = make_llama(tmp_path_factory.mktemp("generate") / "hf")
    words = {word: id for id, word in enumerate(["<s>", "</s>", "hello", "<user>", "<model>"])}
    words |= {f"w{id}": id for id in range(len(words), VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="hello"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=template)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("imported", [False, True])
def test_the_command_answers_by_the_chat_template(imported, chatty, pool, tmp_path):
    if imported:  # the tokenizer travels in the checkpoint
        pool.run(1, "tests.hf.workers:convert", [(str(chatty), str(tmp_path / "run"), str(tmp_path / "out"))])
    model = ["--checkpoint", str(tmp_path / "run")] if imported else ["--hf", str(chatty)]
    done = megalong("generate", *model, "--prompt", "w7 w8", "--chat", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    expected = greedy_of_transformers(chatty, [3, 7, 8, 4], 6)
    assert 1 not in expected
    assert done.stdout.split() == [{2: "hello", 3: "<user>", 4: "<model>"}.get(id, f"w{id}") for id in expected]


def test_an_answer_ends_where_the_model_says(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_ids(tmp_path, 3) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert end_ids(tmp_path, 3) == {8, 9}
    assert end_ids(tmp_path / "nowhere", 3) == {3}
    for broken in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(broken)
        with pytest.raises(UserError, match=r"generation_config\.json: (not valid JSON|contains a list)"):
            end_ids(tmp_path, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1: must be 0"),
        ({"top_p": 1.5, "temperature": 1.0}, "--top-p 1.5: must be a probability"),
        ({"top_k": 5}, "--top-k limits sampling, .* add --temperature 1"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None, "prompt_file": "nowhere"}, "--prompt-file nowhere: No such file"),
        ({"hf": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(chatty, changed, message):
    with pytest.raises(UserError, match=message) as error:
        generate(**{"hf": str(chatty), "prompt": "hello", **changed})
    assert "\n" not in str(error.value)


def test_a_model_without_tokenizer_or_template_is_told(chatty, tmp_path):
    bare = make_llama(tmp_path / "bare")
    with pytest.raises(UserError, match="bare has no tokenizer; put"):
        generate(hf=str(bare), prompt="hello")
    plain = PreTrainedTokenizerFast.from_pretrained(chatty)
    plain.chat_template = None
    plain.save_pretrained(bare)
    with pytest.raises(UserError, match=r"--chat: .*bare has no chat template.* or leave --chat out"):
        generate(hf=str(bare), prompt="hello", chat=True)


SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('needs\na system turn') }}{% endif %}"
TEMPLATES = {
    "{{ raise_exception('not today') }}": r"--chat: the chat template refuses it \(not today\); leave --chat out",
    SYSTEM: r"refuses it \(needs a system turn\)",
    "{% if %}": r"--chat: the chat template of .* is broken at line 1: ",
    "\n{{ x | nowhere }}": r"is broken at line 2: No filter named 'nowhere'",
    "{{ 1 // 0 }}": r"refuses it \(.*division",
    "{{ messages[7].content + 1 }}": r"refuses it \(",
    "{% for i in range(99999999999) %}{% endfor %}": r"refuses it \(",
    "{{ ''.nowhere.at.all }}": r"refuses it \(",
    "": r"has no chat template",
    " ": r"the prompt is empty",
    "a list": r"has several chat templates \(rag, tool_use\); keep one",
    "no names": r"the tokenizer of .* cannot be read \(",
    "a number": r"has no chat template",
    "broken settings": r"the tokenizer of .* cannot be read \(",
    "broken tokenizer": r"the tokenizer of .* cannot be read \(",
}
FILES = {
    "a list": {"chat_template": [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]},
    "no names": {"chat_template": [{"template": "a"}, {"template": "b"}]},
    "a number": {"chat_template": 7},
}


def with_template(chatty, folder, template):
    shutil.copytree(chatty, folder)
    settings = folder / "tokenizer_config.json"
    if template in FILES:
        (folder / "chat_template.jinja").unlink()
        settings.write_text(json.dumps(json.loads(settings.read_text()) | FILES[template]))
    elif template == "broken settings":
        settings.write_text("{")
    elif template == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_cannot_ask_are_told_in_one_line(template, chatty, tmp_path):
    folder = with_template(chatty, tmp_path / "hf", template)
    with pytest.raises(UserError, match=TEMPLATES[template]) as error:
        generate(hf=str(folder), prompt="hello", chat=True)
    assert "\n" not in str(error.value)


def test_one_template_by_the_name_of_default_asks(chatty, tmp_path):
    folder = with_template(chatty, tmp_path / "hf", "a list")
    settings = folder / "tokenizer_config.json"
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "<user> {{ messages[0].content }}"}]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": named}))
    template = ChatTemplate(folder, "--chat")
    turns = [{"role": "user", "content": "w7"}]
    assert template.text(turns) == AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False)
    with pytest.raises(UserError, match=r"sft.tokenizer: .* has several chat templates \(rag, default\)"):
        ChatTemplate(folder)


def test_a_prompt_that_would_end_its_own_turn_is_told(chatty):
    with pytest.raises(UserError, match=r"--chat: a turn of role user spells the token '</s>'; leave --chat out"):
        generate(hf=str(chatty), prompt="w7 </s>", chat=True)
    with pytest.raises(UserError, match="--prompt: not UTF-8 text"):
        generate(hf=str(chatty), prompt="w7 \udcff")


def test_more_positions_than_rope_covers_are_warned_of(chatty, capsys):
    generate(hf=str(chatty), prompt="w9 w10", max_new_tokens=4)
    assert "expect bad predictions" not in capsys.readouterr().err
    generate(hf=str(chatty), prompt="w9 w10", max_new_tokens=63)  # the model has 64 positions
    told = capsys.readouterr().err
    assert "prompt and --max-new-tokens: 65 positions are used, and the rope of " in told
    assert "(none) covers 64: expect bad predictions beyond" in told
