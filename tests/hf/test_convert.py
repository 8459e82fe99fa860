"""Import and export as a user runs them: bit-exact both ways, under any layout, mistakes told before writing."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megalong.checkpoint.folder import read_meta, write_meta
from megalong.cli import main
from megalong.config.rope import RopeSettings
from tests.hf.conftest import MakeLlama, write_llama
from tests.pool import WorkerPool


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "fp32": {"rope_parameters": LLAMA3},
    "fp32-tied": {"tie_word_embeddings": True},
    "bf16": {"dtype": torch.bfloat16, "shard_size": "40KB"},
    "bf16-tied": {"dtype": torch.bfloat16, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "fp16": {"dtype": torch.float16, "num_key_value_heads": 8},
    "mistral": {"family": {"model_type": "mistral", "sliding_window": 7}},
    "mistral-full": {"family": {"model_type": "mistral", "sliding_window": None}},
    "ministral": {
        "family": {
            "model_type": "ministral", "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    },
}  # fmt: skip


@dataclass
class Conversion:
    """A model, the checkpoint it was imported to, and the export of that."""

    hf: Path
    checkpoint: Path
    output: Path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> dict[str, Conversion]:
    """Every one of MODELS, imported and exported."""
    root = tmp_path_factory.mktemp("converted")
    found = {name: Conversion(root / name / "hf", root / name / "ckpt", root / name / "out") for name in MODELS}
    for name, settings in MODELS.items():
        write_llama(found[name].hf, **settings)
    jobs = [(str(one.hf), str(one.checkpoint), str(one.output)) for one in found.values()]
    pool.run(1, "tests.hf.workers:convert", jobs)
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_there_and_back_loses_no_bit(converted: dict[str, Conversion], name: str) -> None:
    one = converted[name]
    assert_same_bits(one.hf, one.output)
    assert (one.output / "model.safetensors.index.json").is_file()


def test_tokenizer_and_generation_config_travel_along(converted: dict[str, Conversion]) -> None:
    hf, output = converted["bf16"].hf, converted["bf16"].output
    encoded = [AutoTokenizer.from_pretrained(folder).encode("a long story") for folder in (hf, output)]
    assert encoded[0] == encoded[1]
    assert (output / "chat_template.jinja").read_text() == (hf / "chat_template.jinja").read_text()
    assert GenerationConfig.from_pretrained(output).to_dict() == GenerationConfig.from_pretrained(hf).to_dict()


@pytest.mark.parametrize("name", ["fp32", "fp32-tied", "bf16", "mistral", "mistral-full", "ministral"])
def test_transformers_computes_the_same_logits_from_the_export(converted: dict[str, Conversion], name: str) -> None:
    tokens = torch.arange(100)[None] * 5 % 515
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for folder in (converted[name].hf, converted[name].output)
    )
    assert type(before) is type(after)
    assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_a_checkpoint_of_any_layout_exports_the_same(pool: WorkerPool, tmp_path: Path) -> None:
    plain = str(write_llama(tmp_path / "plain", num_hidden_layers=4))
    tied = str(write_llama(tmp_path / "tied", num_hidden_layers=4, tie_word_embeddings=True))
    cases = [(plain, 4, 1), (plain, 2, 2), (tied, 2, 2)]
    runs = [str(tmp_path / f"run-{number}") for number in range(len(cases))]
    saves = [(hf, run, tensor, pipeline) for run, (hf, tensor, pipeline) in zip(runs, cases, strict=True)]
    pool.run(4, "tests.hf.workers:save_under_layouts", saves)
    pool.run(1, "tests.hf.workers:convert", [(None, run, f"{run}-out") for run in runs])
    for run, (hf, _, _) in zip(runs, cases, strict=True):
        assert_same_bits(Path(hf), Path(f"{run}-out"))


def test_an_extended_model_exports_what_it_was_trained_to(
    converted: dict[str, Conversion], pool: WorkerPool, tmp_path: Path
) -> None:
    step = shutil.copytree(converted["fp32"].checkpoint / "checkpoints" / "step-00000000", tmp_path / "step")
    settings = step / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 128}))
    meta = read_meta(step)
    extended = meta.architecture.with_rope(
        RopeSettings(type="yarn", factor=16.0, beta_fast=4.0, original_max_position_embeddings=128)
    )
    write_meta(step, meta.model_copy(update={"architecture": extended, "checksums": {}}))
    pool.run(1, "tests.hf.workers:convert", [(None, str(step), str(tmp_path / "long"))], "bfloat16")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == 16.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())["model_max_length"] == 2048
    before = tensors_of(converted["fp32"].hf)
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in tensors_of(tmp_path / "long").items())


def test_mistakes_end_with_one_line_and_write_nothing(
    make_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = make_llama(), tmp_path / "out"
    broken = make_llama(name="broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    taken = tmp_path / "taken"
    taken.write_text("a file")
    capsys.readouterr()
    for arguments, complaint in (
        (["import", "--hf", str(tmp_path / "nowhere"), "--output", str(output)], "no such file"),
        (["import", "--hf", str(broken), "--output", str(output)], "truncated"),
        (["import", "--hf", str(folder), "--output", str(taken)], "exists already"),
        (["export", "--checkpoint", str(folder), "--output", str(output)], "holds no checkpoint"),
    ):
        assert main(["checkpoint", *arguments]) == 2
        message = capsys.readouterr().err
        assert complaint in message
        assert message.count("\n") == 1
        assert not output.exists()


def test_what_is_there_already_is_never_overwritten(
    converted: dict[str, Conversion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = converted["bf16"]
    assert main(["checkpoint", "import", "--hf", str(one.hf), "--output", str(one.checkpoint)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["checkpoint", "export", "--checkpoint", str(one.checkpoint), "--output", str(one.output)]) == 2
    assert "exists already" in capsys.readouterr().err
    missing = ["--checkpoint", str(one.checkpoint), "--step", "3", "--output", str(tmp_path / "new")]
    assert main(["export-hf", *missing]) == 2
    assert "no checkpoint of step 3" in capsys.readouterr().err
