"""Reading whole and sharded folders, and what is said about broken ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalong.errors import UserError
from megalong.hf.reader import HFReader
from tests.hf.conftest import MakeLlama, architecture_of

QKV = "model.layers.1.self_attn.q_proj.weight"


def only_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("shard_size", [None, "40KB"])
def test_ranges_of_whole_and_sharded_checkpoints(make_llama: MakeLlama, shard_size: str | None) -> None:
    folder = make_llama(shard_size=shard_size)
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_size is not None)
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    with HFReader(folder) as reader:
        reader.check(architecture_of())
        assert set(reader.names) == set(tensors)
        assert torch.equal(reader.read(QKV, 0, 20, 10), tensors[QKV][20:30])
        assert torch.equal(reader.read(QKV, 1, 6, 5), tensors[QKV][:, 6:11])
        assert torch.equal(reader.read("model.norm.weight"), tensors["model.norm.weight"])


def test_dtypes(make_llama: MakeLlama) -> None:
    folder = make_llama(dtype=torch.bfloat16)
    with HFReader(folder) as reader:
        assert reader.widest_dtype(reader.names) == torch.bfloat16
    rewrite(folder, {"model.norm.weight": torch.ones(48, dtype=torch.float16)})
    with HFReader(folder) as reader:
        assert reader.widest_dtype(reader.names) == torch.float32


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        HFReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        HFReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="safe_serialization=True") as error:
        HFReader(tmp_path)
    only_line(error)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file(make_llama: MakeLlama, keep: int) -> None:
    path = make_llama() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated") as error:
        HFReader(path.parent)
    only_line(error)


def test_a_missing_shard_and_a_wrong_index(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    moved = {**whole["weight_map"], "model.norm.weight": first.name}
    for content, complaint in (
        ({"weight_map": moved}, f"model.norm.weight in {first.name}, which does not hold it"),
        ({"weight_map": {"model.norm.weight": "../../etc/passwd"}}, "not the name of a file"),
        ({"weight_map": {}}, "weight_map must be"),
        ([], "not a safetensors index"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=complaint) as error:
            HFReader(folder)
        only_line(error)
    index.write_text(json.dumps(whole)[:100])
    with pytest.raises(UserError, match="not a safetensors index"):
        HFReader(folder)
    index.write_text(json.dumps(whole))
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: this shard is listed"):
        HFReader(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({QKV: None}, "q_proj.weight is in none of the files"),
        ({"lm_head.weight": None}, "set tie_word_embeddings to true"),
        ({QKV: torch.zeros(80, 47)}, r"has shape \[80, 47\], config.json says \[80, 48\]"),
        ({QKV: torch.zeros(80, 48, dtype=torch.int8)}, "stored as I8; quantized"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(80)}, "belongs to no plain Llama"),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(80, 48)}, "belongs to no plain Llama"),
    ],
)
def test_files_that_do_not_fit_the_config(
    make_llama: MakeLlama, change: dict[str, torch.Tensor | None], complaint: str
) -> None:
    folder = make_llama()
    rewrite(folder, change)
    with HFReader(folder) as reader, pytest.raises(UserError, match=complaint) as error:
        reader.check(architecture_of())
    only_line(error)


def test_tensors_that_add_nothing_are_passed_over(make_llama: MakeLlama) -> None:
    folder = make_llama(tie_word_embeddings=True)
    tied = architecture_of(tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, {"a.rotary_emb.inv_freq": torch.ones(5), "lm_head.weight": embedding.clone()})
    with HFReader(folder) as reader:
        reader.check(tied)
    rewrite(folder, {"lm_head.weight": embedding + 1})
    with HFReader(folder) as reader, pytest.raises(UserError, match="differs from the embedding"):
        reader.check(tied)
