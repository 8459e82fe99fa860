"""Three families of chat templates, a tokenizer for them, and conversations, written for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
}
MARKED = {
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + '</s>' }}{% endgeneration %}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
}
PLAIN = {
    family: template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for family, template in MARKED.items()
}
TEXT = "Who wrote it? What is the answer, and why do you ask? It was the cat that sat on a mat. " * 4


def make_tokenizer(folder: Path, family: str, marked: bool = True) -> Path:
    """Save a byte-level BPE of at most 400 ids with the family's special tokens and template to `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL[family], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=SPECIAL[family])
    tokenizer.chat_template = (MARKED if marked else PLAIN)[family]
    tokenizer.save_pretrained(folder)
    return folder


def chats(number: int, system: bool = False) -> list[list[dict[str, str]]]:
    """Conversations of one to three exchanges, all different."""
    words = TEXT.split()
    found = []
    for n in range(number):
        turns = [{"role": "system", "content": "Be brief."}] if system and n % 2 else []
        for turn in range(1 + n % 3):
            turns.append({"role": "user", "content": " ".join(words[: 2 + (n * 5 + turn) % 7]) + f" {n}?"})
            turns.append(
                {"role": "assistant", "content": " ".join(words[n % 5 : n % 5 + 1 + (n + turn) % 9]) + f" {n}é"}
            )
        found.append(turns)
    return found


def write_lines(path: Path, records: list[Any]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
