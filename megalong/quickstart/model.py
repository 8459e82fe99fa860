"""The initial model, in the format of the Hugging Face hub: a tokenizer and a small Llama with random weights.

The tokenizer is a byte-level BPE (no text is out of vocabulary) of 512 entries. It is small because in a few minutes a
model sees only a few million tokens, and must see each embedding often.

`transformers` and `tokenizers` are imported where they are used: if these steps are already done, neither is needed.
"""

from __future__ import annotations

from pathlib import Path

from megalong.quickstart.corpus import training_texts
from megalong.runtime.folders import with_default_mode

VOCABULARY = 512
SEPARATOR = "<s>"
END_OF_TEXT = "<|end_of_text|>"
ORIGINAL_LENGTH = 256
# How the tokenizer writes a conversation; `generation` marks the text to train on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '### Answer\n' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '### Question\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def train_tokenizer(corpus: Path, folder: Path) -> None:
    """Train the tokenizer on the training documents in `corpus`; save it in Hugging Face's format to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = training_texts(corpus)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=END_OF_TEXT, model_max_length=ORIGINAL_LENGTH
    )
    saved.chat_template = CHAT_TEMPLATE
    saved.save_pretrained(folder)
    sample = max(texts, key=len)
    print(f"{VOCABULARY} entries, {len(sample) / len(saved(sample)['input_ids']):.2f} characters per token of code")


def make_random_llama(tokenizer: Path, folder: Path) -> None:
    """Save a random Llama with grouped-query attention, and its tokenizer, in Hugging Face's format to `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(1234)
    config = LlamaConfig(
        **SIZES,
        vocab_size=VOCABULARY,
        max_position_embeddings=ORIGINAL_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    for file in folder.iterdir():
        with_default_mode(file)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters, {ORIGINAL_LENGTH} positions, {SIZES}")
