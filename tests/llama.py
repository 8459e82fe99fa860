"""A small Llama and a small dataset that make mistakes visible, shared by the tests of model, training and checkpoint.

The weights are scaled until attention is far from uniform (scores with a standard deviation of 2 and more): with fresh
weights every score is nearly zero, attention is an average, and a wrong mask or position hardly shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalong.data.indexed_writer import IndexedDatasetWriter

VOCABULARY = 515
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a Hugging Face Llama with peaked attention to `folder`."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **overrides}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(1.6)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_dataset(prefix: Path, documents: int = 60, seed: int = 0) -> Path:
    """An indexed dataset of random documents, 5 to 200 tokens each, in which the next token can partly be learnt."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            start, stride = rng.integers(2, VOCABULARY), rng.integers(1, 7)
            length = int(rng.integers(5, 200))
            tokens = (start + stride * np.arange(length)) % (VOCABULARY - 2) + 2
            writer.add_document(np.where(rng.random(length) < 0.1, rng.integers(2, VOCABULARY, length), tokens))
        writer.finish()
    return prefix


def run_settings(folder: Path, hf: Path, data: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a tree: ten steps in fp32 of the small Llama; `sections` override key by key."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "dir": str(folder)},
        "model": {"load": {"hf": str(hf)}},
        "data": {"seq_length": 64, "mixture": [{"name": "only", "path": str(data), "weight": 1.0}], "split": "90,10"},
        "parallel": {},
        "precision": {"params_dtype": "fp32"},
        "memory": {},
        # Where a gradient is not far above eps, AdamW's step depends on how the gradient was rounded. With the usual
        # 1e-8, weights that differ by 1e-7 drift apart as far as layouts do, and 1e-5 could not tell a bug from noise;
        # with 1e-5, two layouts' gradient norms stay within 2e-6 over ten steps.
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_iters": 2, "adam_eps": 1e-5},
        "training": {"train_iters": 10, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {},
        "evaluation": {},
        "logging": {"tensorboard": False},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return tree


def single_sample_settings(folder: Path, hf: Path, data: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """`run_settings` with one sample a micro-batch: four of them in one process, so that a pipeline of two is full."""
    tree = run_settings(folder, hf, data, **sections)
    tree["training"]["micro_batch_size"] = 1
    return tree
