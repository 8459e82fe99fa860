"""The indexed dataset against Megatron-Core's own builder and reader, and against damaged copies."""

import contextlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from megalong.data.indexed import IndexedDataset, token_type
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.errors import UserError

LENGTHS = [3, 1, 0, 700, 2, 0, 5]


def documents(vocabulary: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, length) for length in LENGTHS]


def write(prefix: Path, vocabulary: int = 60000, sidecar: dict[str, object] | None = None) -> list[np.ndarray]:
    texts = documents(vocabulary)
    with IndexedDatasetWriter(prefix, token_type(vocabulary)) as writer:
        writer.add_documents(np.concatenate(texts), np.array(LENGTHS))
        writer.finish(sidecar)
    return texts


def write_with_megatron(prefix: Path, vocabulary: int, sequences: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
    for tokens, lengths in zip(documents(vocabulary), sequences, strict=True):
        builder.add_document(torch.from_numpy(tokens), lengths)
    builder.finalize(f"{prefix}.idx")


def whole() -> list[list[int]]:
    return [[length] if length else [] for length in LENGTHS]


def cut() -> list[list[int]]:
    return [[1, length - 1] if length > 1 else [length] for length in LENGTHS]


@pytest.mark.parametrize("vocabulary", [515, 65499, 65500, 128256])
def test_files_are_megatrons_byte_for_byte(tmp_path: Path, vocabulary: int) -> None:
    write(tmp_path / "ours", vocabulary)
    write_with_megatron(tmp_path / "theirs", vocabulary, whole())
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_documents_of_several_sequences_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "ours", np.uint16) as writer:
        for tokens, lengths in zip(documents(60000), cut(), strict=True):
            writer.add_document(tokens, lengths)
        writer.finish()
    write_with_megatron(tmp_path / "theirs", 60000, cut())
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("sequences", [whole(), cut()], ids=["whole", "cut"])
def test_reader_agrees_with_megatrons_reader_on_its_own_files(tmp_path: Path, sequences: list[list[int]]) -> None:
    write_with_megatron(tmp_path / "theirs", 128256, sequences)
    ours, theirs = IndexedDataset(tmp_path / "theirs"), MegatronDataset(str(tmp_path / "theirs"))
    assert ours.sidecar is None
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours.lengths, theirs.sequence_lengths)
    np.testing.assert_array_equal(ours.document_indices, theirs.document_indices)
    for index in range(len(theirs)):
        np.testing.assert_array_equal(ours.get(index), theirs[index])
    longest = int(np.argmax(ours.lengths))
    np.testing.assert_array_equal(ours.get(longest, 1, 3), theirs.get(longest, 1, 3))
    assert [ours.document(d).tolist() for d in range(ours.num_documents)] == [d.tolist() for d in documents(128256)]
    assert ours.num_tokens == sum(LENGTHS)
    assert ours.document_lengths.tolist() == LENGTHS


def test_megatron_reads_ours(tmp_path: Path) -> None:
    texts = [text for text in write(tmp_path / "ours", 515) if len(text)]
    theirs = MegatronDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [text.tolist() for text in texts]


def test_positions_past_two_gigabytes_do_not_overflow(tmp_path: Path) -> None:
    lengths = np.full(5, 2**30, np.int32)
    ends = np.cumsum(lengths.astype(np.int64)) * 4
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 5, 6)
    index = header + lengths.tobytes() + (ends - ends[0]).tobytes() + np.arange(6, dtype=np.int64).tobytes()
    (tmp_path / "big.idx").write_bytes(index)
    with (tmp_path / "big.bin").open("wb") as file:  # sparse: 20 GiB that take no room
        file.truncate(int(ends[-1]))
        file.seek(int(ends[-1]) - 4)
        file.write(struct.pack("<i", 77))
    dataset = IndexedDataset(tmp_path / "big")
    assert dataset.num_tokens == 5 * 2**30
    assert dataset.get(4, 2**30 - 2).tolist() == [0, 77]


@pytest.mark.parametrize(
    ("index", "offset", "length"), [(-1, 0, None), (5, 0, None), (0, -1, 1), (0, 0, 4), (0, 2, -1)]
)
def test_reading_outside_is_refused(tmp_path: Path, index: int, offset: int, length: int | None) -> None:
    write(tmp_path / "d")
    with pytest.raises(IndexError):
        IndexedDataset(tmp_path / "d").get(index, offset, length)


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("ending", "offset", "data", "told"),
    [
        (".idx", 0, b"X", "not an indexed dataset"),
        (".idx", 9, b"\2", "version 2"),
        (".idx", 17, b"\x2a", "token type 42"),
        (".idx", 17, b"\6", "float64, not tokens"),
        (".idx", 17, b"\4", "pointers"),
        (".idx", 18, b"\xff" * 8, "expected"),
        (".idx", 34, struct.pack("<i", 4), "pointers"),
        (".idx", 34, struct.pack("<i", -3), "pointers"),
        (".idx", -8, struct.pack("<q", 4), "boundaries"),
    ],
)
def test_a_damaged_index_is_told(tmp_path: Path, ending: str, offset: int, data: bytes, told: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / f"d{ending}"
    damage(path, offset if offset >= 0 else path.stat().st_size + offset, data)
    with pytest.raises(UserError, match=told) as error:
        IndexedDataset(tmp_path / "d")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("ending", "size"), [(".bin", 1422), (".idx", 34 + 12 * 5 + 8 * 8)])
@pytest.mark.parametrize("change", [-1, -60, 2])
def test_a_file_of_another_size_is_told_with_both_sizes(tmp_path: Path, ending: str, size: int, change: int) -> None:
    write(tmp_path / "d")
    path = tmp_path / f"d{ending}"
    assert path.stat().st_size == size
    path.write_bytes((path.read_bytes() + b"\0\0")[: size + change])
    with pytest.raises(UserError, match=rf"{path}: {size + change} bytes found, {size} expected"):
        IndexedDataset(tmp_path / "d")


def test_headers_cut_short_and_missing_files_are_told(tmp_path: Path) -> None:
    write(tmp_path / "d")
    with pytest.raises(UserError, match=r"leave out '\.bin'"):
        IndexedDataset(tmp_path / "d.bin")
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(UserError, match="7 bytes, shorter than an index's header of 34"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "d.idx").unlink()
    with pytest.raises(UserError, match=r"d\.idx does not exist"):
        IndexedDataset(tmp_path / "d")


def test_a_sidecar_of_other_tokens_is_told(tmp_path: Path) -> None:
    write(tmp_path / "d", sidecar={"note": "ours"})
    assert IndexedDataset(tmp_path / "d").sidecar == {
        "format": 1, "documents": 7, "tokens": 711, "dtype": "uint16", "note": "ours",
    }  # fmt: skip
    changed = json.loads((tmp_path / "d.json").read_text()) | {"tokens": 712}
    (tmp_path / "d.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="describes another dataset"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        IndexedDataset(tmp_path / "d")


def test_an_unfinished_writer_leaves_the_old_dataset_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "d", sidecar={})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with contextlib.suppress(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.arange(9))
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("killed_at", range(6))
def test_a_writer_killed_while_publishing_never_mixes_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Cut before the n-th of its five changes on disk: what opens is the old dataset or the new, or nothing opens."""
    old = np.concatenate(write(tmp_path / "d", sidecar={}))
    changes = iter(range(100))

    def counted(change):  # type: ignore[no-untyped-def]
        def run(*arguments, **options):  # type: ignore[no-untyped-def]
            if next(changes) >= killed_at:
                raise SystemExit
            return change(*arguments, **options)

        return run

    writer = IndexedDatasetWriter(tmp_path / "d", np.uint16)
    writer.add_document(np.flip(old))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    with contextlib.suppress(SystemExit):
        writer.finish({})
    monkeypatch.undo()
    writer.abandon()
    if 0 < killed_at < 5:
        with pytest.raises(UserError, match=r"d\.idx does not exist"):
            IndexedDataset(tmp_path / "d")
    else:
        dataset = IndexedDataset(tmp_path / "d")
        expected = old if killed_at == 0 else np.flip(old)
        np.testing.assert_array_equal(dataset.read(0, dataset.num_tokens), expected)


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for token in (-1, 65536):
            with pytest.raises(ValueError, match="do not fit uint16"):
                writer.add_document(np.array([token]))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    """The .bin is a link to /dev/full, which takes nothing; an old dataset of the name stays as it was."""
    texts = write(tmp_path / "data")
    (tmp_path / f"data.bin.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"{tmp_path}/data: cannot be written .No space left on device.; make room"):
        write(tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]
    assert np.array_equal(IndexedDataset(tmp_path / "data").document(0), texts[0])
