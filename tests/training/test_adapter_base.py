"""The base that an exported adapter names: what `peft` loads by that name alone computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM

from megalong.checkpoint.folder import find_checkpoint, read_meta
from megalong.hf.base import hub_name
from tests.hf.conftest import save_tokenizer
from tests.llama import make_dataset, make_llama, run_settings

LORA: dict[str, Any] = {"rank": 4, "target_modules": ("q_proj", "down_proj")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(make_llama(folder / "hf"))
    return folder / "hf", make_dataset(folder / "data")


def lora_settings(run: Path, hf: Path, data: Path, **sections: Any) -> dict[str, Any]:
    return run_settings(
        run, hf, data, lora=LORA, training={"train_iters": 2}, optimizer={"lr": 1e-1, "warmup_iters": 1}, **sections
    )


def export(pool, run: Path, output: Path, *more: str) -> tuple[dict[str, Any], str]:
    """(adapter_config.json, what was said) of an export of the run's adapters."""
    words = ["checkpoint", "export", "--checkpoint", str(run), "--adapter", "--output", str(output), *more]
    ((status, out, errors),) = pool.run(1, "tests.training.workers:command", words)
    assert status == 0, errors
    return json.loads((output / "adapter_config.json").read_text()), out + errors


@pytest.fixture(scope="module")
def trained(sources, pool, tmp_path_factory):
    """A run of two steps, stopped after the first, that names its model by a path from where it was started."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "model").symlink_to(sources[0])
    settings = lora_settings(folder / "run", Path("model"), sources[1], checkpoint={"save_interval": 1})
    pool.run(1, "tests.training.workers:train_run_in", str(folder), settings, 1)
    pool.run(1, "tests.training.workers:train_run_in", str(folder), settings)
    return folder


def test_peft_loads_the_adapter_by_the_name_it_gives(trained, pool, tmp_path):
    """From any folder, with the logits of the merged export."""
    (tmp_path / "adapter").mkdir()  # an empty folder is no export
    config, said = export(pool, trained / "run", tmp_path / "adapter")
    merged = tmp_path / "merged"
    words = ["checkpoint", "export", "--checkpoint", str(trained / "run"), "--output", str(merged)]
    assert pool.run(1, "tests.training.workers:command", words)[0][0] == 0
    assert config["base_model_name_or_path"] == str(trained / "model")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["revision"] is None
    assert f"for the base {trained / 'model'}" in said
    assert "trained with" not in said
    read = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert read.base_model_name_or_path == str(trained / "model")
    tokens = torch.arange(60)[None] * 7 % 515
    with torch.no_grad():
        ours = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)(tokens).logits
        plain, whole = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            for folder in (trained / "model", merged)
        )
    assert (ours - whole).abs().max() < 1e-4
    assert (plain - whole).abs().max() > 0.1


def test_another_name_can_be_given(trained, pool, tmp_path):
    config, _ = export(pool, trained / "run", tmp_path / "adapter", "--base", "meta-llama/Llama-3.1-8B")
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    words = ["checkpoint", "export", "--checkpoint", "run", "--output", "out", "--base", "b"]
    ((status, _, errors),) = pool.run(1, "tests.training.workers:command", words)
    assert (status, errors.count("\n")) == (2, 1)
    assert "add --adapter" in errors


def test_an_import_and_a_run_from_it_remember_the_folder(sources, pool, tmp_path):
    """A run on a run's adapters too, here under another rope, which the base's own config.json does not have."""
    hf, data = sources
    imported = tmp_path / "imported"
    pool.run(1, "tests.training.workers:command", ["import-hf", "--hf", str(hf), "--output", str(imported)])
    first = lora_settings(tmp_path / "first", hf, data, model={"load": {"checkpoint": str(imported)}})
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    again = {"load": {"checkpoint": str(tmp_path / "first")}, "rope": rope}
    pool.run(1, "tests.training.workers:train_run", first)
    pool.run(1, "tests.training.workers:train_run", lora_settings(tmp_path / "second", hf, data, model=again))
    config, said = export(pool, tmp_path / "second", tmp_path / "adapter")
    assert config["base_model_name_or_path"] == str(hf)
    assert "trained with rope yarn × 4 (the base has none)" in said


def test_a_base_that_was_trained_here_is_named_as_what_it_is(sources, pool, tmp_path):
    hf, data = sources
    whole = run_settings(tmp_path / "whole", hf, data, training={"train_iters": 1}, optimizer={"warmup_iters": 0})
    pool.run(1, "tests.training.workers:train_run", whole)
    start = find_checkpoint(tmp_path / "whole")
    assert read_meta(start).base is None
    settings = lora_settings(tmp_path / "run", hf, data, model={"load": {"checkpoint": str(tmp_path / "whole")}})
    pool.run(1, "tests.training.workers:train_run", settings)
    config, said = export(pool, tmp_path / "run", tmp_path / "adapter")
    assert config["base_model_name_or_path"] == str(start)
    assert f"{start} is a checkpoint, which peft does not read: export it" in said


def test_a_folder_of_the_hubs_cache_is_called_by_its_name_on_the_hub(tmp_path):
    cached = tmp_path / "hub" / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "d04e592b"
    cached.mkdir(parents=True)
    (tmp_path / "link").symlink_to(cached)
    assert hub_name(str(cached)) == hub_name(str(tmp_path / "link")) == ("meta-llama/Llama-3.1-8B", "d04e592b")
    assert hub_name("/hub/models--gpt2/snapshots/1") == ("gpt2", "1")
    assert hub_name("/models/llama") == ("/models/llama", None)
