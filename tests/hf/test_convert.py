"""Import and export as a user runs them: bit-exact both ways, under any layout, mistakes told before writing."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

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
LLAMA32 = {**LLAMA3, "factor": 32.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama 3.2": {"rope_parameters": LLAMA32, "max_position_embeddings": 256},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 80},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
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


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_but_spelling_differs_where_nothing_was_trained(converted: dict[str, Conversion], name: str) -> None:
    one = converted[name]
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (one.hf, one.output))
    scaling, left = before.pop("rope_parameters"), after.pop("rope_parameters")
    assert scaling.items() <= left.items()
    own = {"_name_or_path": "", "architectures": [], "pretraining_tp": 1}  # a Mistral's weights were a Llama's
    assert before | own == after | own
    for file in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        assert (one.output / file).read_bytes() == (one.hf / file).read_bytes(), file


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


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_extended_model_exports_what_it_was_trained_to(
    converted: dict[str, Conversion], pool: WorkerPool, tmp_path: Path
) -> None:
    """128 positions become 2048, and no file says less; transformers generates on a prompt of 600 tokens."""
    step = shutil.copytree(converted["fp32"].checkpoint / "checkpoints" / "step-00000000", tmp_path / "step")
    kept = step / "tokenizer"
    change(kept / "tokenizer_config.json", model_max_length=128, max_len=100)
    change(
        kept / "generation_config.json",
        max_length=128,
        max_new_tokens=5,
        eos_token_id=[1, 3],
        cache_implementation="static",
    )
    change(kept / "config.json", max_sequence_length=128.0, max_length=100, seq_length=None)
    truncation = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
    change(kept / "tokenizer.json", truncation=truncation)
    meta = read_meta(step)
    extended = meta.architecture.with_rope(
        RopeSettings(type="yarn", factor=16.0, beta_fast=4.0, original_max_position_embeddings=128)
    )
    write_meta(step, meta.model_copy(update={"architecture": extended, "checksums": {}}))
    pool.run(1, "tests.hf.workers:convert", [(None, str(step), str(tmp_path / "long"))], "bfloat16")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == config["max_sequence_length"] == config["max_length"] == 2048
    assert config["seq_length"] is None
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == 16.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "long")
    assert tokenizer.model_max_length == 2048
    assert len(Tokenizer.from_file(str(tmp_path / "long" / "tokenizer.json")).encode("a long story " * 300).ids) > 600
    generation = GenerationConfig.from_pretrained(tmp_path / "long")
    assert (generation.max_length, generation.max_new_tokens, generation.eos_token_id) == (2048, 5, [1, 3])
    prompt = torch.tensor([tokenizer.encode("a long story " * 300)[:600]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    model.generation_config.max_new_tokens = None
    model.generation_config.max_length = min(generation.max_length, 603)  # what is left of the length takes long
    assert 600 < model.generate(prompt, do_sample=False).shape[1] <= 603
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
        (["export", "--checkpoint", str(folder), "--output", str(output)], "has no checkpoint"),
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
