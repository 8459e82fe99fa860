"""One tokenization everywhere, tokenizer.json's, whatever class transformers would load; and names it gives tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalong.data.tokenizer import TextTokenizer
from megalong.sft.formats import BadSampleError, Conversation
from megalong.sft.mask import tokenize
from megalong.sft.template import ChatTemplate
from megalong.sft.words import Words, open_tokenizer
from tests.sft.chats import TEXT

CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = ["?!\n\nok", "  a  b\n\n\n c", "1234567 don't", "x .\n y ,"]
CLASSES: dict[str, dict[str, Any]] = {
    "GPT2Tokenizer": {},
    "GPT2TokenizerFast": {"add_prefix_space": True},
    "LlamaTokenizer": {"legacy": False},
    "LlamaTokenizerFast": {"legacy": True, "add_prefix_space": True, "clean_up_tokenization_spaces": True},
    "Qwen2Tokenizer": {"add_prefix_space": False},
    "PreTrainedTokenizerFast": {"clean_up_tokenization_spaces": True},
}


def saved(folder: Path, tokenizer_class: str, metaspace: bool = False, **settings: Any) -> Path:
    """A folder with a tokenizer.json of rules of its own, and settings that name a class with others."""
    bpe = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        bpe.decoder, alphabet = decoders.Metaspace(prepend_scheme="never"), [chr(n) for n in range(32, 127)] + ["\n"]
    else:
        split = pre_tokenizers.Split(Regex(CL100K), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        [TEXT + "\n\n ?!\n\n !\n\n ok\n\n"] * 3,
        trainers.BpeTrainer(vocab_size=450, special_tokens=special, initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def by_file(folder: Path, text: str) -> list[int]:
    """Ids of `tokenizers` alone: each stretch between special tokens by the file, as `data preprocess` has it."""
    tokenizer, plain = Tokenizer.from_file(str(folder / "tokenizer.json")), TextTokenizer(folder)
    ids: list[int] = []
    for piece in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
        special = tokenizer.token_to_id(piece)
        ids += [special] if piece.startswith("<|") and special is not None else plain.encode(piece)
    return ids


@pytest.mark.parametrize("metaspace", [False, True], ids=["byte level", "metaspace"])
@pytest.mark.parametrize("tokenizer_class", CLASSES)
def test_ids_are_those_of_the_file_under_every_class(tokenizer_class: str, metaspace: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "t", tokenizer_class, metaspace, **CLASSES[tokenizer_class])
    template = ChatTemplate(folder)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in SAID:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        found = tokenize(template, Conversation(turns))
        written = template.text(turns)
        assert found.ids.tolist() == by_file(folder, written)
        assert template.words.prompt(text) == reference.encode(text).ids
        assert template.words.decode(found.ids[found.targets]) == reference.decode(reference.encode(text).ids[1:])
    if tokenizer_class == "GPT2Tokenizer":  # what is guarded against is there
        assert AutoTokenizer.from_pretrained(folder).encode(SAID[0], add_special_tokens=False) != by_file(
            folder, SAID[0]
        )


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("begin", [False, True])
def test_begin_and_end_are_those_of_the_file(begin: bool, end: bool, tmp_path: Path) -> None:
    """As in transformers' class that takes tokenizer.json as it is; flags are of classes that build theirs anew."""
    folder = saved(tmp_path / "t", "PreTrainedTokenizerFast", add_bos_token=begin, add_eos_token=end)
    wanted = PreTrainedTokenizerFast.from_pretrained(folder).encode(SAID[0])
    assert Words(folder, open_tokenizer(folder, "here")).prompt(SAID[0]) == wanted
    assert (wanted[0], wanted[-1] != 1) == (0, True)


def test_a_named_token_that_the_file_does_not_add_is_special(tmp_path: Path) -> None:
    """As transformers has it where the vocabulary knows it; one that the vocabulary lacks is never text."""
    folder = saved(tmp_path / "t", "PreTrainedTokenizerFast")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_end|>"}))
    template, theirs = ChatTemplate(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = tokenize(template, Conversation(turns))
    assert found.ids.tolist() == theirs.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert template.words.decode(found.ids[found.targets]) == "b"
    with pytest.raises(BadSampleError, match=r"spells the token '<\|im_end\|>'"):
        tokenize(template, Conversation([{"role": "user", "content": "a<|im_end|>"}, turns[1]]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|nowhere|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("'<|im_end|>'", "eos_token"))
    with pytest.raises(BadSampleError, match=r"writes '<\|nowhere\|>', which tokenizer.json does not have"):
        tokenize(ChatTemplate(folder), Conversation(turns))
