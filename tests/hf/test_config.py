"""config.json read and written, against what transformers makes of the same files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalong.config.rope import RopeSettings
from megalong.errors import UserError
from megalong.hf.config import read_architecture, write_config
from megalong.rope import inverse_frequencies
from tests.hf.conftest import ROPE, SHAPE, architecture_of

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 16.0, "beta_fast": 4.0, "beta_slow": 1.0, "original_max_position_embeddings": 128},
    "llama3": LLAMA3,
}


def save(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain(**overrides: Any) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it."""
    return {"model_type": "llama", **SHAPE, "rope_theta": 10000.0, "torch_dtype": "bfloat16", **overrides}


def test_a_config_of_transformers_gives_the_architecture(tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, rope_parameters=dict(ROPE), bos_token_id=0, eos_token_id=[1, 5], dtype="float32")
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == architecture_of(eos_token_id=[1, 5])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "ministral"])
def test_what_is_left_out_means_what_transformers_takes_it_for(tmp_path: Path, model_type: str) -> None:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    save(tmp_path, {"model_type": model_type, **{key: SHAPE[key] for key in keys}})
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_architecture(tmp_path)
    assert ours.num_query_groups == theirs.num_key_value_heads == 8
    assert ours.kv_channels == 6
    assert theirs.head_dim == 6 or (model_type == "ministral" and theirs.head_dim is None)
    assert ours.layer_windows == (getattr(theirs, "sliding_window", None),) * 3
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", list(ROPES))
@pytest.mark.parametrize("spelling", ["legacy", "five"])
def test_every_rope_round_trips_through_transformers(tmp_path: Path, kind: str, spelling: str) -> None:
    scaling = {"rope_type": kind, **ROPES[kind]}
    longest = round(128 * ROPES[kind].get("factor", 1)) if "original_max_position_embeddings" in scaling else 128
    base = plain(max_position_embeddings=longest)
    if spelling == "five":
        del base["rope_theta"]
        base["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    elif kind != "default":
        base["rope_scaling"] = scaling
    architecture = read_architecture(save(tmp_path / "in", base))
    written = write_config(architecture, base)
    assert read_architecture(save(tmp_path / "out", written)) == architecture
    before, after = (AutoConfig.from_pretrained(tmp_path / name) for name in ("in", "out"))
    own = ("_name_or_path", "architectures", "rope_parameters")
    assert {k: v for k, v in before.to_dict().items() if k not in own} == {
        k: v for k, v in after.to_dict().items() if k not in own
    }
    theirs, ours = LlamaRotaryEmbedding(before), LlamaRotaryEmbedding(after)
    assert torch.equal(theirs.inv_freq, ours.inv_freq)
    assert theirs.attention_scaling == ours.attention_scaling
    after.save_pretrained(tmp_path / "again")
    assert read_architecture(tmp_path / "again") == architecture


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "ntk"])
def test_an_extended_model_exports_the_rope_it_was_trained_with(tmp_path: Path, kind: str) -> None:
    original = read_architecture(save(tmp_path / "in", plain()))
    base = json.loads((tmp_path / "in" / "config.json").read_text())
    extended = original.with_rope(RopeSettings(type=kind, factor=16.0, beta_fast=4.0))
    written = write_config(extended, base)
    config = AutoConfig.from_pretrained(save(tmp_path / "out", written))
    assert config.max_position_embeddings == written["max_position_embeddings"] == 16 * 128
    if kind != "ntk":
        assert written["rope_scaling"]["rope_type"] == config.rope_parameters["rope_type"] == kind
        assert written["rope_scaling"]["factor"] == config.rope_parameters["factor"] == 16.0
    assert torch.equal(LlamaRotaryEmbedding(config).inv_freq, inverse_frequencies(extended.rope, 10))


# As published: names, lengths and factors as the releases have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 2": {"max_position_embeddings": 4096},
    "Mistral, long without scaling": {"max_position_embeddings": 32768, "rope_theta": 1e6},
    "Llama 3.1": {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "Llama 3.2": {
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "DeepSeek Coder": {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "Yarn-Llama-2": {
        "max_position_embeddings": 65536,
        "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
    },
    "yarn, its own length beside": {
        "max_position_embeddings": 40960,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn, mscale": {
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
    "five's spelling": {
        "max_position_embeddings": 131072,
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_nothing_was_trained_of_leaves_with_the_lengths_it_came_with(tmp_path: Path, name: str) -> None:
    base = {key: value for key, value in plain(**PUBLISHED[name]).items() if value is not None}
    first = write_config(read_architecture(save(tmp_path / "in", base)), base)
    second = write_config(read_architecture(save(tmp_path / "first", first)), first)
    save(tmp_path / "second", second)
    assert first == second
    theirs = [AutoConfig.from_pretrained(tmp_path / folder) for folder in ("in", "first", "second")]
    for after in theirs[1:]:
        assert after.max_position_embeddings == base["max_position_embeddings"]
        before, left = theirs[0].to_dict(), after.to_dict()
        scaling = before["rope_parameters"]
        scaling.pop("finetuned", None)  # which nothing reads
        assert scaling.items() <= left["rope_parameters"].items()
        rotary = LlamaRotaryEmbedding(theirs[0]), LlamaRotaryEmbedding(after)
        assert torch.equal(rotary[0].inv_freq, rotary[1].inv_freq)
        assert rotary[0].attention_scaling == rotary[1].attention_scaling


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear"])
def test_an_extended_model_reads_factor_times_its_original_length(tmp_path: Path, name: str, kind: str) -> None:
    """What the length before any scaling was: the section's, or the published length over linear's factor."""
    base = {key: value for key, value in plain(**PUBLISHED[name]).items() if value is not None}
    architecture = read_architecture(save(tmp_path / "in", base))
    scaling = base.get("rope_scaling") or base.get("rope_parameters") or {}
    original = scaling.get("original_max_position_embeddings", base["max_position_embeddings"])
    original = original // 4 if scaling.get("type") == "linear" else original
    extended = architecture.with_rope(RopeSettings(type=kind, factor=64.0))
    assert extended.with_rope(RopeSettings(type=kind, factor=64.0)) == extended
    written = write_config(extended, base)
    again = write_config(read_architecture(save(tmp_path / "out", written)), written)
    assert written["max_position_embeddings"] == again["max_position_embeddings"] == 64 * original
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(save(tmp_path / "again", again)))
    assert torch.equal(rotary.inv_freq, inverse_frequencies(extended.rope, 10))


def test_whole_numbers_may_be_written_as_fractions(tmp_path: Path) -> None:
    """What writes config.json in another language has one kind of number."""
    whole = plain(max_position_embeddings=2048, rope_scaling={"rope_type": "yarn", **ROPES["yarn"]}, eos_token_id=1)
    floats = {key: float(value) if type(value) is int else value for key, value in whole.items()}
    floats["rope_scaling"] = {key: float(v) if type(v) is int else v for key, v in whole["rope_scaling"].items()}
    assert floats["hidden_size"] == 48.0
    found = read_architecture(save(tmp_path / "floats", floats))
    assert found == read_architecture(save(tmp_path / "whole", whole))
    written = write_config(found, floats)
    assert type(written["hidden_size"]) is type(written["eos_token_id"]) is int
    assert AutoConfig.from_pretrained(save(tmp_path / "out", written)).max_position_embeddings == 2048


def test_unknown_fields_survive_and_stale_ones_do_not(tmp_path: Path) -> None:
    base = plain(
        initializer_range=0.01, my_note={"kept": [1]}, _name_or_path="/somewhere", original_max_position_embeddings=7
    )
    written = write_config(architecture_of(torch_dtype="float16"), base)
    assert written["my_note"] == {"kept": [1]}
    assert written["initializer_range"] == 0.01
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["torch_dtype"] == written["dtype"] == "float16"
    assert "_name_or_path" not in written
    assert "original_max_position_embeddings" not in written
    assert read_architecture(save(tmp_path, write_config(architecture_of()))) == architecture_of()


@pytest.mark.parametrize(
    ("fields", "windows", "leaves_as"),
    [
        ({"model_type": "llama"}, (None,) * 3, "Llama"),
        ({"model_type": "llama", "sliding_window": 9, "layer_types": [SLIDING] * 3}, (None,) * 3, "Llama"),
        ({"model_type": "mistral", "sliding_window": 9}, (9,) * 3, "Mistral"),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 3, "Mistral"),
        ({"model_type": "ministral", "sliding_window": 9}, (9,) * 3, "Ministral"),
        ({"model_type": "ministral", "sliding_window": 9, "layer_types": [SLIDING, FULL, FULL]}, (9, None, None), None),
        ({"model_type": "ministral", "sliding_window": 9, "layer_types": [FULL] * 3}, (None,) * 3, "Ministral"),
    ],
)
def test_windows_round_trip_under_the_same_name(
    tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...], leaves_as: str | None
) -> None:
    base = plain(**fields)
    architecture = read_architecture(save(tmp_path / "in", base))
    assert architecture.layer_windows == windows
    written = write_config(architecture, base)
    assert read_architecture(save(tmp_path / "out", written)).layer_windows == windows
    assert written["architectures"] == [f"{leaves_as or 'Ministral'}ForCausalLM"]
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == fields["model_type"] == written["model_type"]
    if leaves_as != "Llama":
        assert config.sliding_window == next((window for window in windows if window), None)
    else:
        assert "sliding_window" not in written
        assert "layer_types" not in written


@pytest.mark.parametrize(
    ("window", "leaves_as"),
    [
        ((9, None), {"llama": "mistral", "mistral": "mistral", "ministral": "ministral"}),
        ((9, 2), {"llama": "ministral", "mistral": "ministral", "ministral": "ministral"}),
        ((9, 1), {"llama": "llama", "mistral": "mistral", "ministral": "ministral"}),
    ],
)
def test_a_model_trained_in_other_windows_leaves_under_a_name_that_has_them(
    tmp_path: Path, window: tuple[int, int | None], leaves_as: dict[str, str]
) -> None:
    for before, after in leaves_as.items():
        base = plain(model_type=before, sliding_window=5)
        trained = read_architecture(save(tmp_path / before, base)).with_window(*window)
        written = write_config(trained, base)
        assert written["model_type"] == after
        assert read_architecture(save(tmp_path / f"{before}-out", written)).layer_windows == trained.layer_windows
    assert write_config(trained)["model_type"] == leaves_as["llama"]


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype(tmp_path: Path, spelling: str) -> None:
    base = plain()
    del base["torch_dtype"]
    assert read_architecture(save(tmp_path, base)).torch_dtype == "float32"
    for value in ("float16", "torch.float16"):
        assert read_architecture(save(tmp_path, {**base, spelling: value})).torch_dtype == "float16"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"model_type": "qwen2"}, 'model_type = "qwen2": supported are llama, mistral, ministral'),
        ({"model_type": ["llama"]}, "model_type = "),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0"),
        ({"model_type": "mistral", "sliding_window": "4096"}, 'sliding_window = "4096"'),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias = true"),
        ({"model_type": "mistral", "layer_types": [SLIDING] * 3}, 'layer_types = .* or write model_type "ministral"'),
        ({"model_type": "ministral", "layer_types": [SLIDING] * 2}, "layer_types = .* each of the 3 layers"),
        (
            {"model_type": "ministral", "layer_types": [SLIDING, FULL, "chunked_attention"]},
            "layer_types = .*or full_att",
        ),
        ({"model_type": "ministral", "layer_types": "all"}, 'layer_types = "all"'),
        ({"model_type": "ministral", "layer_types": [SLIDING] * 3, "sliding_window": None}, "without sliding_window"),
        ({"model_type": None}, "model_type = null"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*use the bf16"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map = .*never run"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "big"}}, "factor.*'big'"),
        ({"torch_dtype": "float8_e4m3fn"}, 'torch_dtype = "float8_e4m3fn"'),
        ({"hidden_size": "48"}, 'hidden_size = "48"'),
        ({"hidden_size": 48.5}, "hidden_size = 48.5"),
        ({"max_position_embeddings": "2048"}, 'max_position_embeddings = "2048"'),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"intermediate_size": 0}, "intermediate_size = 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps = null"),
    ],
)
def test_what_is_refused_is_named_in_one_line(tmp_path: Path, overrides: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        read_architecture(save(tmp_path, plain(**overrides)))
    assert str(error.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "contains a list"),
        ("", "not valid JSON"),
        ("\xff", "not valid"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=complaint):
        read_architecture(tmp_path)
    no_size = plain()
    del no_size["hidden_size"]
    with pytest.raises(UserError, match="hidden_size is missing"):
        read_architecture(save(tmp_path, no_size))


def test_reading_a_config_imports_no_transformers() -> None:
    code = "import sys, megalong.hf.config; print(any('transformers' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
