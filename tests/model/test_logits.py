"""Imported weights give transformers' logits: ropes, far past the original length, windows, under TP and CP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalong.attention.layout import TokenLayout, tokens_of
from megalong.checkpoint.folder import find_checkpoint, read_meta, write_meta
from tests.llama import VOCABULARY, make_llama
from tests.pool import WorkerPool

SEQUENCE = 64
ORIGINAL = 64
FAR = 1_000_000
ROPES: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default", "rope_theta": 10000.0},
    "base_change": {"rope_type": "default", "rope_theta": 1.28e8},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 16.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 4.0, "beta_slow": 1.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    },
}  # fmt: skip


def transformers_logits(folder: Path, positions: list[int], tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits of transformers with its rotary angles in float64, and the spread of its attention scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    rotary = model.model.rotary_emb

    def exact(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * rotary.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * rotary.attention_scaling).float(), (angles.sin() * rotary.attention_scaling).float()

    rotary.forward = exact
    scores: list[torch.Tensor] = []
    layer = model.model.layers[0].self_attn

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:2], -1, layer.head_dim)
        query, key = layer.q_proj(hidden).view(shape), layer.k_proj(hidden).view(shape)
        key = key.repeat_interleave(layer.num_key_value_groups, dim=2)
        scores.append(torch.einsum("bqhd,bkhd->bhqk", query, key) * layer.scaling)

    handle = layer.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        out = model(torch.tensor(tokens), position_ids=torch.tensor([positions] * len(tokens))).logits
    handle.remove()
    return out.double().numpy(), float(scores[0].std())


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(rope: str, tied: bool, tmp_path: Path, pool: WorkerPool) -> None:
    folder = make_llama(tmp_path / "hf", rope_parameters=ROPES[rope], tie_word_embeddings=tied)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, SEQUENCE))
    for first in (0, FAR):
        positions = list(range(first, first + SEQUENCE))
        theirs, spread = transformers_logits(folder, positions, tokens)
        assert spread >= 2, "attention is too uniform to show a mistake"
        (ours,) = pool.run(1, "tests.model.workers:logits", str(folder), positions, tokens.tolist(), {})
        assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.parametrize("parallel", [{"tensor": 4}, {"context": 4}, {"tensor": 2, "context": 2}])
def test_logits_equal_transformers_under_every_layout(
    parallel: dict[str, int], tmp_path: Path, pool: WorkerPool
) -> None:
    folder = make_llama(tmp_path / "hf", rope_parameters=ROPES["yarn"])
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (2, SEQUENCE))
    positions = list(range(FAR, FAR + SEQUENCE))
    theirs, _ = transformers_logits(folder, positions, tokens)
    tensor, context = parallel.get("tensor", 1), parallel.get("context", 1)
    world = tensor * context
    ranks = pool.run(world, "tests.model.workers:logits", str(folder), positions, tokens.tolist(), parallel)
    for rank, ours in enumerate(ranks):
        rows = tokens_of(TokenLayout(context).runs(SEQUENCE, np.zeros(1, np.int64))[rank // tensor])
        assert np.abs(ours - theirs[:, rows]).max() <= 1e-4


def test_ntk_aware_is_another_base(tmp_path: Path, pool: WorkerPool) -> None:
    """transformers has no static NTK: its model under the base b * s^(d / (d - 2)) is the truth."""
    factor, head_dim = 16.0, 8
    base = 10000.0 * factor ** (head_dim / (head_dim - 2))
    changed = make_llama(tmp_path / "changed", rope_parameters={"rope_type": "default", "rope_theta": base})
    plain = make_llama(tmp_path / "plain", rope_parameters=ROPES["none"])
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (1, SEQUENCE))
    positions = list(range(FAR, FAR + SEQUENCE))
    theirs, _ = transformers_logits(changed, positions, tokens)
    rope = {"type": "ntk", "factor": factor}
    (ours,) = pool.run(1, "tests.model.workers:logits", str(plain), positions, tokens.tolist(), {}, rope)
    assert np.abs(ours - theirs).max() <= 1e-4


SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral of one token": {"model_type": "mistral", "sliding_window": 1},
    "mistral without window": {"model_type": "mistral", "sliding_window": None},
    "ministral": {"model_type": "ministral", "sliding_window": 7, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
}


def rename(folder: Path, fields: dict[str, Any]) -> None:
    """The same weights under another name: put `fields` into config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_those_of_transformers(family: str, tmp_path: Path, pool: WorkerPool) -> None:
    folder = make_llama(tmp_path / "hf", rope_parameters=ROPES["yarn"])
    rename(folder, FAMILIES[family])
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, (2, SEQUENCE))
    positions = list(range(FAR, FAR + SEQUENCE))
    theirs, _ = transformers_logits(folder, positions, tokens)
    for context in (1, 2):
        arguments = str(folder), positions, tokens.tolist(), {"context": context}
        for rank, ours in enumerate(pool.run(context, "tests.model.workers:logits", *arguments)):
            rows = tokens_of(TokenLayout(context).runs(SEQUENCE, np.zeros(1, np.int64))[rank])
            assert np.abs(ours - theirs[:, rows]).max() <= 1e-4
    window = FAMILIES[family]["sliding_window"]
    if window is not None:  # one token more or less would show
        rename(folder, {"sliding_window": window + 1})
        assert np.abs(transformers_logits(folder, positions, tokens)[0] - theirs).max() > 1e-2


@pytest.mark.parametrize(("frequency", "name"), [(None, "MistralForCausalLM"), (3, "MinistralForCausalLM")])
def test_a_llama_trained_in_windows_leaves_as_what_has_them(
    frequency: int | None, name: str, tmp_path: Path, pool: WorkerPool
) -> None:
    folder, checkpoint, output = make_llama(tmp_path / "hf"), tmp_path / "checkpoint", tmp_path / "output"
    jobs = [(str(folder), str(checkpoint), str(tmp_path / "full"))]
    pool.run(1, "tests.hf.workers:convert", jobs)
    step = find_checkpoint(checkpoint)
    meta = read_meta(step)
    trained = meta.model_copy(update={"architecture": meta.architecture.with_window(5, frequency)})
    write_meta(step, trained)
    pool.run(1, "tests.hf.workers:convert", [(None, str(checkpoint), str(output))])
    tokens, positions = np.random.default_rng(5).integers(0, VOCABULARY, (2, SEQUENCE)), list(range(SEQUENCE))
    window = (5, frequency)
    (ours,) = pool.run(1, "tests.model.workers:logits", str(folder), positions, tokens.tolist(), {}, None, window)
    assert type(AutoModelForCausalLM.from_pretrained(output)).__name__ == name
    assert np.abs(ours - transformers_logits(output, positions, tokens)[0]).max() <= 1e-4
    assert np.abs(ours - transformers_logits(tmp_path / "full", positions, tokens)[0]).max() > 1e-2
