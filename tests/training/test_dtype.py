"""The type that a run's weights leave in, by export, evaluation and generation: the one they were trained in.

The source is in bf16 and the run in fp32 (and the other way round): rounding to the source's type shows in logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megalong.checkpoint.folder import find_checkpoint, read_meta, write_meta
from tests.hf.conftest import save_tokenizer
from tests.llama import make_dataset, make_llama, run_settings
from tests.training.gradients import plain_llama

TOKENS = torch.arange(60)[None] * 7 % 515
LORA: dict[str, Any] = {"rank": 4, "target_modules": ("q_proj", "v_proj", "down_proj")}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtype")
    for name, dtype in {**TYPES, "fp16": torch.float16}.items():
        save_tokenizer(make_llama(folder / name, dtype=dtype))
    torch.manual_seed(3)
    peft = get_peft_model(
        plain_llama(folder / "bf16"), LoraConfig(r=4, lora_alpha=16, target_modules=LORA["target_modules"])
    )
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    peft.save_pretrained(folder / "adapter")
    return folder, make_dataset(folder / "data")


def command(pool, *words: str | Path) -> tuple[str, str]:
    ((status, out, errors),) = pool.run(1, "tests.training.workers:command", [str(word) for word in words])
    assert status == 0, errors
    return out, errors


def train(pool, sources, run: Path, source: str, dtype: str, imported: bool = False, **sections: Any) -> Path:
    folder, data = sources
    tree = run_settings(
        run, folder / source, data, precision={"params_dtype": dtype}, training={"train_iters": 1},
        optimizer={"lr": 1e-3, "warmup_iters": 0}, **sections,
    )  # fmt: skip
    if imported:
        command(pool, "import-hf", "--hf", folder / source, "--output", run.with_name("imported"))
        tree["model"]["load"] = {"checkpoint": str(run.with_name("imported"))}
    pool.run(1, "tests.training.workers:train_run", tree)
    return run


def logits(folder: Path, **how: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    with torch.no_grad():
        return model(TOKENS).logits.float()


def types(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize(
    ("source", "trained", "name", "imported"),
    [("bf16", "fp32", "float32", True), ("bf16", "fp32", "float32", False), ("fp16", "bf16", "bfloat16", True)],
)
def test_an_export_is_in_the_type_that_was_trained(pool, sources, tmp_path, source, trained, name, imported) -> None:
    run = train(pool, sources, tmp_path / "run", source, trained, imported)
    _, said = command(pool, "checkpoint", "export", "--checkpoint", run, "--output", tmp_path / "out")
    started = {"bf16": "bfloat16", "fp16": "float16"}[source]
    assert f"written in {name}, which they were trained in (the model this started from: {started})" in said
    assert types(tmp_path / "out") == {TYPES[trained]}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == name
    narrow = ("checkpoint", "export", "--checkpoint", run, "--output", tmp_path / "narrow", "--dtype", "float16")
    assert f"written in float16, as --dtype says; they were trained in {name}" in command(pool, *narrow)[1]
    assert types(tmp_path / "narrow") == {torch.float16}


def test_an_earlier_checkpoint_that_says_its_settings_is_exported_as_trained(pool, sources, tmp_path) -> None:
    """And one that does not, in the type of the model it started from."""
    run = train(pool, sources, tmp_path / "run", "bf16", "fp32")
    meta = read_meta(find_checkpoint(run))
    assert (meta.dtype, meta.architecture.torch_dtype) == ("float32", "bfloat16")
    write_meta(find_checkpoint(run), meta.model_copy(update={"settings": {}}))
    assert read_meta(find_checkpoint(run)).dtype == "bfloat16"


def test_merged_adapters_keep_their_logits(pool, sources, tmp_path) -> None:
    """Against peft's own merge in float32; at another type, what is rounded is the sum."""
    folder = sources[0]
    run = train(
        pool, sources, tmp_path / "run", "bf16", "fp32", lora={**LORA, "load": str(folder / "adapter")},
    )  # fmt: skip
    command(pool, "checkpoint", "export", "--checkpoint", run, "--adapter", "--output", tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()} == {
        torch.float32
    }
    theirs = PeftModel.from_pretrained(plain_llama(folder / "bf16"), tmp_path / "adapter").merge_and_unload()
    command(pool, "checkpoint", "export", "--checkpoint", run, "--output", tmp_path / "merged")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert (logits(tmp_path / "merged", dtype="auto") - expected).abs().max() < 1e-4
    rounding = ("checkpoint", "export", "--checkpoint", run, "--output", tmp_path / "bf16", "--dtype", "bfloat16")
    command(pool, *rounding)
    ours, once = load_file(tmp_path / "bf16/model.safetensors"), theirs.state_dict()
    for name, tensor in ours.items():
        apart = tensor.ne(once[name].bfloat16()).float().mean()  # the sum's own last bit, of a few weights
        assert apart < 1e-3, name


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_evaluation_and_generation_compute_in_it(pool, sources, tmp_path, dtype) -> None:
    run = train(pool, sources, tmp_path / "run", "bf16", "fp32")
    more = ["--dtype", dtype] if dtype else []
    _, said = command(pool, "generate", "--checkpoint", run, "--prompt", "a long", "--max-new-tokens", "4", *more)
    told = "computes in bfloat16, as --dtype says, instead of float32 as trained" if dtype else "in float32, as trained"
    assert told in said
    command(pool, "checkpoint", "export", "--checkpoint", run, "--output", tmp_path / "exported")
    exact, rounded = (logits(tmp_path / "exported", dtype=one)[0, -1] for one in (torch.float32, torch.bfloat16))
    (ours,) = pool.run(1, "tests.evaluation.workers:next_logits", None, TOKENS[0].tolist(), run, dtype)
    error, theirs = ((one - exact).abs().max() for one in (torch.tensor(ours), rounded))
    assert theirs / 4 < error < 2 * theirs if dtype else error < 1e-4


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_a_hugging_face_folder_is_computed_in_its_own_type(pool, sources, name) -> None:
    """fp16 has three bits more than bf16: rounded to that, logits are ten times as far off."""
    folder = sources[0] / name
    (ours,) = pool.run(1, "tests.evaluation.workers:next_logits", folder, TOKENS[0].tolist())
    exact = logits(folder, dtype=torch.float32)[0, -1]
    theirs = logits(folder, dtype="auto")[0, -1]
    assert (torch.tensor(ours) - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-4
