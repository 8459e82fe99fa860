"""Tensors read straight to their places, beside torch's own reader; and what it says of files that are not whole."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalong.checkpoint.checksum import ChecksumReader, checksum
from tests.pool import WorkerPool


def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path: Path, pool: WorkerPool) -> None:
    pool.run(1, "tests.checkpoint.test_reading:read_both_ways", tmp_path)


def read_both_ways(folder: Path) -> None:
    """In a worker, because importing Megatron-Core changes a process."""
    from megalong.runtime.megatron import prepare

    prepare(torch.device("cpu"))
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import FileSystemReader

    from megalong.checkpoint import reading

    stored = kinds()
    checkpoint.save(stored, checkpoint_id=folder, no_dist=True)
    wanted = {name: value.new_full(value.shape, 1) for name, value in stored.items()}
    # Places that are not as what is stored: of another type, or not in one piece.
    wanted["float32"] = torch.ones(7, 300, dtype=torch.float64)
    wanted["bfloat16"] = torch.ones(64, 1000, dtype=torch.bfloat16)[:, ::2][:, :300]
    verification = _Verification(folder)
    ours, theirs = wanted, {name: value.clone() for name, value in wanted.items()}
    checkpoint.load(theirs, storage_reader=FileSystemReader(folder), no_dist=True)
    direct: list[str] = []
    find = reading._find

    def seen(*arguments: Any) -> Any:
        direct.append("direct" if (found := find(*arguments)) else "torch")
        return found

    reading._find = seen  # type: ignore[assignment]
    checkpoint.load(ours, storage_reader=reading.DirectReader(folder, verification), no_dist=True)  # type: ignore[arg-type]
    for name, value in theirs.items():
        assert torch.equal(ours[name].float(), value.float()), name
        assert torch.equal(value.to(stored[name].dtype), stored[name]), name
    assert direct.count("torch") == 2, "what lies by columns, and a type torch saves in another way"
    files = sorted(folder.glob("*.distcp"))
    assert verification.found == {path.name: f"{zlib.crc32(path.read_bytes()):08x}" for path in files}


def kinds() -> dict[str, torch.Tensor]:
    """Tensors of many types and shapes; one lies by columns, and one torch saves in another way."""
    torch.manual_seed(0)
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    found = {str(kind).removeprefix("torch."): (torch.randn(7, 300) * 3).to(kind) for kind in types}
    found["bfloat16"] = torch.randn(64, 300).bfloat16()
    found["large"] = torch.randn(3, 1 << 18)
    found["number"] = torch.tensor(3.5)
    found["empty"] = torch.empty(0, 5)
    found["columns"] = torch.randn(6, 9).T
    found["float8"] = torch.randn(5, 5).to(torch.float8_e4m3fn)
    return found


class _Verification:
    """Wants every file, and keeps what it is told."""

    def __init__(self, folder: Path) -> None:
        self.left = {path.name for path in folder.glob("*.distcp")}
        self.found: dict[str, str] = {}

    def wants(self, name: str) -> bool:
        return name in self.left

    def record(self, name: str, found: str) -> None:
        self.left.remove(name)
        self.found[name] = found


def test_a_passage_sums_all_that_passes_whatever_is_asked_of_it(tmp_path: Path) -> None:
    path, random = tmp_path / "file", np.random.default_rng(0)
    content = random.integers(0, 256, 5_000_000, np.uint8)
    path.write_bytes(content.tobytes())
    with ChecksumReader(path) as reader:
        # Forward over gaps, again, and partly again.
        for offset, size in [(10, 100), (0, 2_000_000), (1_999_990, 30), (3_000_000, 1_500_000), (5, 4_700_000)]:
            out = np.empty(size, np.uint8)
            reader.copy_to(offset, out)
            assert np.array_equal(out, content[offset : offset + size])
        assert reader.checksum() == f"{zlib.crc32(content):08x}" == checksum(path)
        with pytest.raises(EOFError, match="ends at 5000000"):
            reader.copy_to(4_999_999, np.empty(2, np.uint8))


def test_files_are_dealt_to_those_who_wrote_them_and_else_evenly(pool: WorkerPool) -> None:
    pool.run(1, "tests.checkpoint.test_reading:deal")


def deal() -> None:
    """In a worker as well."""
    from megalong.checkpoint.verification import assign_files

    files = {f"__{rank}_0.distcp": 100 + rank for rank in range(8)} | {".metadata": 5, "common.pt": 7}
    own = [[f"__{rank}_0.distcp"] for rank in range(8)]
    assert assign_files(files, 8) == own
    assert assign_files(files, 9) == [*own, []]
    few = assign_files(files, 3)
    assert sorted(name for share in few for name in share) == sorted(one for (one,) in own)
    assert max(map(len, few)) == 3
    assert few[0][-1] == "__0_0.distcp"
