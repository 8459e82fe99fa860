"""Written folders read back with safetensors and transformers, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalong.config.lora import Lora
from megalong.errors import UserError
from megalong.hf.adapter import write_adapter
from megalong.hf.reader import HFReader
from megalong.hf.writer import check_target, plan_shards, write_folder

SHAPES: dict[str, tuple[int, ...]] = {"a": (8, 4), "b": (16,), "c": (4, 4)}
DTYPE = torch.float32


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, shape) in enumerate(SHAPES.items()):
        yield name, torch.full(shape, float(number))


def test_one_shard_has_the_single_name_and_no_index(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tokenizer.json").write_text("{}")
    (assets / "config.json").write_text('{"stale": true}')
    write_folder(tmp_path / "out", SHAPES, tensors(), DTYPE, {"model_type": "llama"}, assets)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "out"]


def test_shards_and_index_are_what_safetensors_reads(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", SHAPES, tensors(), torch.bfloat16, {}, max_shard_bytes=64)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * (32 + 16 + 16)
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    first = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    assert first["a"].dtype == torch.bfloat16
    with HFReader(tmp_path / "out") as reader:
        assert all(torch.equal(reader.read(name), tensor.bfloat16()) for name, tensor in tensors())


def test_shards_are_filled_in_order_up_to_their_size() -> None:
    assert plan_shards(SHAPES, 4, 10_000) == [["a", "b", "c"]]
    assert plan_shards(SHAPES, 4, 128) == [["a"], ["b", "c"]]
    assert plan_shards(SHAPES, 4, 127) == [["a"], ["b"], ["c"]]
    assert plan_shards(SHAPES, 4, 1) == [["a"], ["b"], ["c"]]


def test_what_was_not_announced_leaves_nothing(tmp_path: Path) -> None:
    for wrong in ({**SHAPES, "d": (1,)}, {"a": (8, 4)}, {**SHAPES, "b": (15,)}):
        with pytest.raises(RuntimeError, match=r"expected tensor|is not in shapes"):
            write_folder(tmp_path / "out", wrong, tensors(), DTYPE, {})
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_refused(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    check_target(full)
    check_target(tmp_path / "new")
    (full / "notes.txt").write_text("mine")
    for target in (full, full / "notes.txt"):
        with pytest.raises(UserError, match="exists already"):
            write_folder(target, SHAPES, tensors(), DTYPE, {})
    assert (full / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"needs 4000000000\.0 GB"):
        write_folder(tmp_path / "huge", {"a": (10**9, 10**9)}, tensors(), DTYPE, {})
    with pytest.raises(UserError, match=r"--output .*: .*notes\.txt is a file"):
        check_target(full / "notes.txt" / "out")


STOPS = """
import sys, time, torch
from pathlib import Path
from megalong.hf.writer import write_folder
shapes = {f"t{i}": (1000,) for i in range(40)}
def tensors():
    for number, name in enumerate(shapes):
        if number == int(sys.argv[2]):
            print("there", flush=True)
            time.sleep(600)
        yield name, torch.ones(1000)
write_folder(Path(sys.argv[1]), shapes, tensors(), torch.float32, {"model_type": "llama"}, max_shard_bytes=8000)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", STOPS, str(output)]
    exports = [subprocess.Popen([*command, str(stop)], stdout=subprocess.PIPE) for stop in (0, 7, 39)]
    for export in exports:
        assert export.stdout is not None
        assert export.stdout.readline() == b"there\n"
        export.send_signal(signal.SIGKILL)
        assert export.wait() == -signal.SIGKILL
        export.stdout.close()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(f"out.tmp-{export.pid}" for export in exports)
    for name in left:
        assert not (tmp_path / name / "config.json").exists()
        with pytest.raises(UserError, match="neither model"):
            HFReader(tmp_path / name)
    subprocess.run([*command, "-1"], check=True, stdout=subprocess.DEVNULL)
    with HFReader(output) as reader:
        assert len(reader.names) == 40


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_a_group_may_read_what_the_umask_lets_it(umask: int, tmp_path: Path) -> None:
    """safetensors itself writes files for their owner alone; the tokenizer they come with may be its owner's alone."""
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tokenizer.json").touch(0o600)
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "out", SHAPES, tensors(), DTYPE, {}, assets, max_shard_bytes=64)
        write_adapter(tmp_path / "adapter", Lora(rank=1), {"a": torch.zeros(2)}, DTYPE, None)
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "adapter"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
        for file in folder.iterdir():
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
