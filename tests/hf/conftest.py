"""Tiny random Llamas and kin in Hugging Face format, with a real (tiny) byte-level BPE tokenizer beside the weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megalong.config.architecture import Architecture
from megalong.config.rope import RopeSettings

# Sizes that are all different, so that a swapped dimension cannot go unnoticed. 515 tokens pad to 640 rows.
SHAPE = {
    "vocab_size": 515,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def architecture_of(**overrides: object) -> Architecture:
    """The `Architecture` of SHAPE, with fields overridden."""
    fields: dict[str, object] = {
        "hidden_size": 48, "ffn_hidden_size": 80, "num_layers": 3, "num_attention_heads": 8, "num_query_groups": 4,
        "kv_channels": 10, "vocab_size": 515, "max_position_embeddings": 128, "norm_epsilon": 1e-5,
        "rope": RopeSettings(rope_theta=10000.0), "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return Architecture(**{**fields, **overrides})


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer of 300 tokens and save it with a chat template and a generation config."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a long context is a long story " * 5], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=[1, 3], temperature=0.6, do_sample=True).save_pretrained(folder)


def write_llama(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    family: dict[str, object] | None = None,
    **overrides: object,
) -> Path:
    """A checkpoint of random weights in `folder`, of SHAPE with `LlamaConfig` fields overridden.

    `family` are fields put into config.json afterwards: the same weights are a Mistral's under its name.
    """
    torch.manual_seed(7)
    settings = {**SHAPE, "rope_parameters": dict(ROPE), "bos_token_id": 0, "eos_token_id": 1, **overrides}
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    save_tokenizer(folder)
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | (family or {})))
    return folder


MakeLlama = Callable[..., Path]


@pytest.fixture
def make_llama(tmp_path: Path) -> MakeLlama:
    """make_llama(name="llama", **arguments of write_llama) -> folder of the checkpoint."""
    return lambda name="llama", **arguments: write_llama(tmp_path / name, **arguments)
