"""Exported rotary fields as transformers itself reads them, and every spelling read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalong.config.rope import RopeSettings
from megalong.errors import UserError
from megalong.rope import from_hf, inverse_frequencies, temperature, to_hf

HEAD_DIM = 64
LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
ALL = [
    RopeSettings(rope_theta=8e6),
    RopeSettings(type="linear", rope_theta=1e4, factor=4),
    RopeSettings(type="ntk", rope_theta=1e4, factor=8),
    RopeSettings(
        type="yarn", rope_theta=5e5, factor=128, beta_fast=4, beta_slow=1, original_max_position_embeddings=8192
    ),
    RopeSettings(
        type="yarn",
        rope_theta=1e4,
        factor=16,
        original_max_position_embeddings=512,
        attention_factor=1.25,
        truncate=False,
    ),
    RopeSettings(
        type="yarn", rope_theta=1e4, factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.5
    ),
    RopeSettings(type="llama3", rope_theta=5e5, factor=8, original_max_position_embeddings=8192),
]
IDS = ["none", "linear", "ntk", "yarn", "yarn-attention-factor", "yarn-mscale", "llama3"]


def rotary_of(fields: dict[str, Any], folder: Path) -> tuple[LlamaRotaryEmbedding, LlamaConfig]:
    """Through a real config.json, as a user's machine would read it."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "head_dim": HEAD_DIM, **fields}))
    config = LlamaConfig.from_pretrained(folder)
    return LlamaRotaryEmbedding(config), config


@pytest.mark.parametrize("rope", ALL, ids=IDS)
@pytest.mark.parametrize("dropped", ["nothing", "rope_parameters", "legacy"])
def test_transformers_builds_our_frequencies_from_either_spelling(
    rope: RopeSettings, dropped: str, tmp_path: Path
) -> None:
    fields = to_hf(rope, 131072, HEAD_DIM)
    for key in {"nothing": [], "rope_parameters": ["rope_parameters"], "legacy": ["rope_theta", "rope_scaling"]}[
        dropped
    ]:
        del fields[key]
    rotary, _ = rotary_of(fields, tmp_path)
    assert torch.equal(rotary.inv_freq, inverse_frequencies(rope, HEAD_DIM))
    assert rotary.attention_scaling == temperature(rope)


@pytest.mark.parametrize("rope", ALL, ids=IDS)
def test_what_is_written_is_read_back(rope: RopeSettings, tmp_path: Path) -> None:
    fields = to_hf(rope, 131072, HEAD_DIM)
    back = from_hf(json.loads(json.dumps(fields)))
    if rope.type == "ntk":
        assert back.type == "none"
        assert back.rope_theta == pytest.approx(1e4 * 8 ** (64 / 62))
    else:
        assert back == rope
    _, config = rotary_of(fields, tmp_path)
    assert from_hf(config.to_dict()) == back  # transformers 5's own spelling, legacy keys dropped


def test_yarn_length_gives_every_version_the_same_factor() -> None:
    fields = to_hf(ALL[3], 131072, HEAD_DIM)
    assert fields["max_position_embeddings"] == 128 * 8192
    assert fields["rope_scaling"]["type"] == fields["rope_scaling"]["rope_type"] == "yarn"
    assert fields["max_position_embeddings"] / fields["rope_scaling"]["original_max_position_embeddings"] == 128


def test_a_length_that_the_factor_does_not_decide_is_the_models_own() -> None:
    """Llama 3.1 and 3.2 both read 131072 positions, with factors 8 and 32 of 8192."""
    for factor in (8.0, 32.0):
        rope = ALL[6].model_copy(update={"factor": factor})
        assert to_hf(rope, 131072, HEAD_DIM)["max_position_embeddings"] == 131072


def test_reads_llama_3_1s_published_fields() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling}
    assert from_hf(config) == ALL[6]


def test_reads_old_spellings_and_defaults_as_transformers_does(tmp_path: Path) -> None:
    old: list[dict[str, Any]] = [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": None, "rope_theta": 1e6},
        {},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 4096},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 1024.0},
        {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": 2}, "rope_theta": 1000000},
        {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": None}, "original_max_position_embeddings": 1024},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "linear", "rope_theta": 7e4}},
    ]
    for fields in old:
        rotary, config = rotary_of({"max_position_embeddings": 2048, **fields}, tmp_path)
        rope = from_hf({"max_position_embeddings": 2048, **fields})
        if "rope_parameters" not in fields:
            assert torch.equal(rotary.inv_freq, inverse_frequencies(rope, HEAD_DIM)), (fields, config)
            assert rotary.attention_scaling == temperature(rope)
        else:
            assert rope == RopeSettings(rope_theta=7e4)


def test_a_missing_yarn_factor_follows_from_the_lengths() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    assert from_hf({"rope_scaling": scaling, "max_position_embeddings": 65536, "rope_theta": 1e4}).factor == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer to layer"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}, "max_position_embeddings": 64},
            "rope_parameters.factor",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "rope_parameters.factor"),
        ({"rope_theta": "1e6"}, r"rope_parameters\.rope_theta: .* '1e6'"),
        ({"rope_theta": 0}, r"rope_parameters\.rope_theta: .* 0"),
        ({"rope_scaling": "yarn"}, 'rope_scaling = "yarn": not a table'),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]: not a table"),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "128"}},
            r"rope_parameters\.original_max_position_embeddings: .* '128'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 128.5}},
            r"rope_parameters\.original_max_position_embeddings: .* 128\.5",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        from_hf(fields)
    assert "\n" not in str(raised.value)


def test_yarn_over_rotations_leaves_as_llama3_or_not_at_all() -> None:
    rope = RopeSettings(
        type="yarn", rope_theta=5e5, factor=128, original_max_position_embeddings=8192, beta_fast=4, beta_slow=1,
        ramp="rotations", attention_factor=1.0,
    )  # fmt: skip
    written = to_hf(rope, 1 << 20, 128)
    assert written["rope_parameters"]["rope_type"] == "llama3"
    read = from_hf(written)
    assert torch.equal(inverse_frequencies(read, 128), inverse_frequencies(rope, 128))
    with pytest.raises(UserError, match=r"ramp: rotations with a temperature of 1.485 .* attention_factor: 1.0"):
        to_hf(rope.model_copy(update={"attention_factor": None}), 1 << 20, 128)
