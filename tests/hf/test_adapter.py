"""Adapter folders that peft wrote: each is read to peft's own logits, or refused by the name of what is not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megalong.config.lora import MODULES
from megalong.errors import UserError
from megalong.hf.adapter import AdapterReader, check_adapter, read_adapter_config
from megalong.hf.config import read_architecture
from tests.hf.conftest import write_llama

TOKENS = torch.arange(60)[None] * 7 % 515
LAST = ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("adapters") / "hf")


def plain(hf: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def save_peft(hf: Path, folder: Path, config: Any, **how: Any) -> Path:
    """An adapter as training leaves it: whatever may learn holds values drawn at random."""
    torch.manual_seed(3)
    model = get_peft_model(plain(hf), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, **how)
    return folder


def ours(hf: Path, folder: Path) -> torch.Tensor:
    """Logits with what is read of the adapter added to the weights it stands beside."""
    lora, architecture = read_adapter_config(folder), read_architecture(hf)
    check_adapter(lora.model_copy(update={"load": str(folder)}), architecture)
    assert lora.rank is not None
    model, read = plain(hf), AdapterReader(folder)
    with torch.no_grad():
        for layer in range(architecture.num_layers):
            for name in lora.target_modules:
                part = "self_attn" if name in MODULES[:4] else "mlp"
                linear = model.get_submodule(f"model.layers.{layer}.{part}.{name}")
                (rows, columns) = linear.weight.shape
                a, b = read(f"model.layers.{layer}.{part}.{name}", (lora.rank, columns), (rows, lora.rank))
                linear.weight += lora.scale * (b @ a)
    return logits(model)


# Read, and what is left over of the configuration is known to change nothing.
READ: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": ["q_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*\.(self_attn\.(k|v)|mlp\.gate)_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "all linear layers but some": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "paths": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "rank-stabilized": {"target_modules": ["v_proj"], "use_rslora": True},
    "with dropout": {"target_modules": ["v_proj"], "lora_dropout": 0.2},
    "gaussian": {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
}
# Refused, by what.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "has lora_bias 'True'"),
    "bias all": ({"target_modules": ["q_proj"], "bias": "all"}, "has bias 'all'"),
    "bias lora_only": ({"target_modules": ["q_proj"], "bias": "lora_only"}, "has bias 'lora_only'"),
    "modules_to_save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        r"has modules_to_save .*embed_tokens",
    ),
    "norms to save": ({"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}, "has modules_to_save"),
    "dora": ({"target_modules": ["q_proj"], "use_dora": True}, "has use_dora 'True'"),
    "rank_pattern": ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}, "has rank_pattern"),
    "alpha_pattern": ({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 2}}, "has alpha_pattern"),
    "some layers": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, "has layers_to_transform"),
    "layer 0": ({"target_modules": ["q_proj"], "layers_to_transform": 0}, "has layers_to_transform '0'"),
    "the last layer by its path": ({"target_modules": LAST}, r"has no .*layers\.0\.self_attn\.q_proj\.lora_A"),
    "replicated layers": ({"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
    "new tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, "has trainable_token_indices"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, r"adapter of .*embed_tokens"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, r"adapter of .*lm_head"),
    "embedding by pattern": ({"target_modules": ".*(embed_tokens|q_proj)"}, "tensor .*embed_tokens.* is not read"),
    "parameters": ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
    "pissa": ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
    "olora": ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "has init_lora_weights 'olora'"),
    "classifier": ({"target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}, "has task_type"),
    "activated": ({"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 5]}, "alora_invocation_tokens"),
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read_gives_pefts_logits(kind: str, hf: Path, tmp_path: Path) -> None:
    folder = save_peft(hf, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=7, **READ[kind]))
    theirs = logits(PeftModel.from_pretrained(plain(hf), folder))
    assert (theirs - logits(plain(hf))).abs().max() > 0.1
    assert (ours(hf, folder) - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(kind: str, hf: Path, tmp_path: Path) -> None:
    settings, message = REFUSED[kind]
    folder = save_peft(hf, tmp_path / "adapter", LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, **settings}))
    with pytest.raises(UserError, match=message) as error:
        ours(hf, folder)
    assert "\n" not in str(error.value)


def test_saved_embeddings_are_refused_by_name(hf: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"])
    folder = save_peft(hf, tmp_path / "adapter", config, save_embedding_layers=True)
    with pytest.raises(UserError, match=r"tensor base_model\.model\.(model\.embed_tokens|lm_head)\.weight \(one of 2"):
        ours(hf, folder)


def test_other_kinds_of_adapters_are_refused(hf: Path, tmp_path: Path) -> None:
    folder = save_peft(hf, tmp_path / "adapter", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="is a PREFIX_TUNING adapter, not LORA"):
        ours(hf, folder)
    pickle = save_peft(hf, tmp_path / "pickle", LoraConfig(r=3, target_modules=["q_proj"]), safe_serialization=False)
    with pytest.raises(UserError, match=r"has adapter_model.bin \(a pickle.* save_pretrained"):
        ours(hf, pickle)


@pytest.fixture(scope="module")
def good(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_peft(hf, tmp_path_factory.mktemp("good") / "adapter", LoraConfig(r=3, target_modules=["q_proj"]))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{Q0}.lora_A.weight", f"{Q0}.lora_A.default.weight", r"tensor .*lora_A\.default\.weight .* is not read"),
        (f"{Q0}.lora_A.weight", Q0.removeprefix("base_model.model.") + ".lora_A.weight", "tensor model.layers.0"),
        (f"{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_A.weight", "tensor base_model.model.base_model"),
        (f"{Q0}.lora_A.weight", None, rf"has no {Q0}.lora_A.weight"),
        (None, f"{Q0}.lora_magnitude_vector", "tensor .*lora_magnitude_vector .* is not read"),
        (None, f"{Q0}.lora_B.bias", r"tensor .*lora_B\.bias .* is not read"),
        (None, "base_model.model.model.norm.weight", r"tensor .*model\.norm\.weight .* is not read"),
        (None, Q0.replace("self_attn", "mlp") + ".lora_A.weight", r"tensor .*mlp\.q_proj.* is not read"),
    ],
)
def test_every_tensor_is_accounted_for(
    old: str | None, new: str | None, message: str, good: Path, hf: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(good, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    moved = tensors.pop(old) if old is not None else torch.zeros(3, 48)
    save_file({**tensors, **({new: moved} if new else {})}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        ours(hf, folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a_setting_of_next_year": {"on": 1}}, "has a_setting_of_next_year"),
        ({"use_rslora": "false"}, "is damaged"),
        ({"r": "3"}, "is damaged"),
        ({"r": True}, "is damaged"),
        ({"lora_alpha": None}, "is damaged"),
        ({"r": 4}, r"has .*lora_A.weight as \[3, 48\], but this model needs \[4, 48\]"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has no .*v_proj.lora_A"),
    ],
)
def test_settings_that_contradict_the_tensors(
    changed: dict[str, Any], message: str, good: Path, hf: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(good, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=message):
        ours(hf, folder)
    file.write_text(
        json.dumps(json.loads((good / "adapter_config.json").read_text()) | {"r": 3.0, "new_and_off": None})
    )
    assert read_adapter_config(folder).rank == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_hidden_layers": 2}, r"has .*layers\.2.*, but this model has 2 layers"),
        ({"num_hidden_layers": 4}, r"has no .*layers\.3"),
        ({"hidden_size": 64, "head_dim": 10}, r"as \[3, 48\], but this model needs \[3, 64\]"),
    ],
)
def test_an_adapter_of_another_model(model: dict[str, Any], message: str, good: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", **model)
    with pytest.raises(UserError, match=message):
        ours(other, good)
