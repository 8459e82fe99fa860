"""Reading whole and sharded folders, and what is said about broken ones."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megalong.errors import UserError
from megalong.hf.config import read_architecture
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


@pytest.mark.parametrize("keep", [5, 200, -1])
def test_a_truncated_file(make_llama: MakeLlama, keep: int) -> None:
    path = make_llama() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated.*download it again") as error:
        HFReader(path.parent)
    only_line(error)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n", "Git LFS pointer.*git lfs"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"PK\x03\x04" + bytes(60), "a pickle of PyTorch"),
        (b"GGUF" + bytes(60), "a GGUF file"),
        (b"some words " * 20, "not a safetensors file"),
        (bytes(200), "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{]" + bytes(20), "damaged: its header"),
        ((2).to_bytes(8, "little") + b"{}" + bytes(20), "damaged: 30 bytes, but its header describes 10"),
    ],
)
def test_a_file_that_is_something_else(make_llama: MakeLlama, content: bytes, complaint: str) -> None:
    path = make_llama() / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{complaint}") as error:
        HFReader(path.parent)
    only_line(error)


def test_a_file_that_may_not_be_read_is_no_damaged_one(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = make_llama(), Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:  # root, as which tests may run, could read anything
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        UserError, match=r"model\.safetensors: this user may not read it \(permission denied\)"
    ) as error:
        HFReader(folder)
    assert "download" not in only_line(error)
    monkeypatch.undo()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "0af1")
    with pytest.raises(UserError, match=r"a link to .*blobs/0af1, which is not there") as error:
        HFReader(folder)
    only_line(error)


def read_by_transformers(folder: Path) -> torch.Tensor:
    return LlamaForCausalLM.from_pretrained(folder).model.norm.weight.detach()


def test_a_stale_index_beside_one_file_is_passed_over_as_transformers_does(make_llama: MakeLlama) -> None:
    folder, sharded = make_llama(), make_llama(name="sharded", shard_size="40KB")
    rewrite(folder, {"model.norm.weight": torch.full((48,), 5.0)})
    index = folder / "model.safetensors.index.json"
    for content in ((sharded / index.name).read_text(), "{", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'):
        index.write_text(content)
        with HFReader(folder) as reader:
            reader.check(architecture_of())
            assert torch.equal(reader.read("model.norm.weight"), read_by_transformers(folder))
            assert reader.read("model.norm.weight")[0] == 5
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    with HFReader(folder) as reader:
        reader.check(architecture_of())


def test_two_sets_of_weights_are_refused(make_llama: MakeLlama) -> None:
    folder, single = make_llama(shard_size="40KB"), make_llama(name="single")
    shutil.copyfile(single / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(UserError, match=r"two sets of weights, model\.safetensors .*model-00001") as error:
        HFReader(folder)
    only_line(error)
    (folder / "model.safetensors").unlink()
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    save_file({**load_file(shard), "model.embed_tokens.weight": torch.zeros(515, 48)}, shard)
    with pytest.raises(UserError, match=r"tensor model\.embed_tokens\.weight is in model-00001.* and in model-"):
        HFReader(folder)


def test_what_shards_hold_beside_the_index_counts_as_it_does_for_transformers(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    (folder / "consolidated.safetensors").write_bytes(b"Mistral's own")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with HFReader(folder) as reader:
        reader.check(architecture_of())
        assert torch.equal(reader.read("model.norm.weight"), read_by_transformers(folder))


def test_an_adapter_beside_the_weights_is_refused(make_llama: MakeLlama) -> None:
    """transformers applies it: what the folder is would depend on who reads it."""
    folder = make_llama()
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    assert any("lora_A" in name for name, _ in LlamaForCausalLM.from_pretrained(folder).named_parameters())
    with pytest.raises(UserError, match=r"a model and an adapter .*lora\.load"):
        HFReader(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="contains an adapter, not a model"):
        HFReader(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="the folder contains an adapter; give its base"):
        read_architecture(folder)


def test_what_to_give_instead_of_a_folder_without_a_model(make_llama: MakeLlama, tmp_path: Path) -> None:
    inner = make_llama(name="cache/snapshots/0af1")
    with pytest.raises(UserError, match=f"config.json: no such file; give {inner}"):
        read_architecture(tmp_path / "cache")
    with pytest.raises(UserError, match="hf download some/model --local-dir"):
        read_architecture("some/model")
    (inner / "model.safetensors").rename(inner / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"only model\.fp16\.safetensors \(1 such\)"):
        HFReader(inner)
    config = json.loads((inner / "config.json").read_text())
    (inner / "config.json").write_text(json.dumps(config | {"transformers_weights": "model.fp16.safetensors"}))
    (inner / "model.safetensors").write_bytes((inner / "model.fp16.safetensors").read_bytes())
    with pytest.raises(UserError, match="transformers_weights"):
        HFReader(inner)


def test_a_missing_shard_and_a_wrong_index(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    moved = {**whole["weight_map"], "model.norm.weight": first.name}
    for content, complaint in (
        ({"weight_map": moved}, f"model.norm.weight in {first.name}, which does not contain it"),
        ({"weight_map": {"model.norm.weight": "../../etc/passwd"}}, "not the name of a file"),
        ({"weight_map": {}}, "weight_map must map"),
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
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(80)}, "is not part of a plain Llama"),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(80, 48)}, "is not part of a plain Llama"),
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
