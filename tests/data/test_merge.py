"""Merged datasets: against one run over the whole corpus, and against Megatron-Core's own builder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.data.corpus.preprocess import preprocess
from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.merge import merge
from megalong.errors import UserError
from tests.data.swapped import with_two_ids_swapped
from tests.data.test_indexed import cut, documents, whole, write_with_megatron

FILES = (".bin", ".idx", ".json")


@pytest.mark.parametrize(("shards", "part"), [(1, 10_000), (3, 10_000), (7, 50_000)])
def test_shards_merge_to_what_one_run_writes(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, shards: int, part: int
) -> None:
    """Seven are more than there are parts: some shards are empty."""
    assert shards < 7 or corpus.stat().st_size < 6 * part
    monkeypatch.setattr("megalong.data.corpus.preprocess.part_bytes", lambda files: part)

    def run(shard: str | None) -> list[str]:
        return preprocess(
            [str(corpus)], str(tmp_path / "out"), str(tokenizer_folder), ("text", "title"), True, shard=shard, workers=2
        )

    expected = run(None)
    parts = [run(f"{place}/{shards}") for place in range(1, shards + 1)]
    assert parts[0][0] == str(tmp_path / f"out_shard_00001_of_{shards:05d}_text_document")
    for key, prefix in enumerate(expected):
        merged = merge([shard[key] for shard in parts], str(tmp_path / f"merged{key}"))
        for ending in FILES:
            assert Path(f"{merged}{ending}").read_bytes() == Path(f"{prefix}{ending}").read_bytes()
    for ending in (".idx", ".bin"):
        inputs = sorted(str(path) for path in tmp_path.glob(f"out_shard_*_text_document{ending}"))
        merge(inputs, str(tmp_path / "again"))
        assert (tmp_path / "again.bin").read_bytes() == Path(f"{expected[0]}.bin").read_bytes()


def test_megatrons_datasets_merge_as_its_builder_does(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_with_megatron(tmp_path / "in" / "a", 60000, cut())
    write_with_megatron(tmp_path / "in" / "b", 60000, whole())
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in ("a", "b"):
        builder.add_index(str(tmp_path / "in" / prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge([str(tmp_path / "in")], str(tmp_path / "ours"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    assert IndexedDataset(tmp_path / "ours").sidecar is None


def test_what_does_not_belong_together_is_refused(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text(with_two_ids_swapped((tokenizer_folder / "tokenizer.json").read_text()))

    def run(name: str, tokenizer: Path, separator: str | None) -> str:
        return preprocess([str(corpus)], str(tmp_path / name), str(tokenizer), separator=separator)[0]

    first, strange = run("first", tokenizer_folder, None), run("strange", other, None)
    separated = run("separated", tokenizer_folder, "<s>")
    write_with_megatron(tmp_path / "bare", 60000, whole())
    write_with_megatron(tmp_path / "wide", 128256, whole())
    for inputs, told in {
        (first, strange): "differ in their tokenizer",
        (first, separated): "differ in their separator",
        (first, str(tmp_path / "bare")): "bare has no sidecar",
        (str(tmp_path / "bare"), str(tmp_path / "wide")): "their vocabularies differ",
        (first, str(tmp_path / "absent")): "absent.idx does not exist",
        (): "no dataset given",
    }.items():
        with pytest.raises(UserError, match=told) as error:
            merge(list(inputs), str(tmp_path / "merged"))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is one of the datasets"):
        merge([first, separated], separated)
    assert not list(tmp_path.glob("merged*"))
    assert IndexedDataset(separated).sidecar is not None


def test_a_dataset_of_many_index_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalong.data.merge.SLICE", 2)
    monkeypatch.setattr("megalong.data.indexed_writer.SLICE", 3)
    write_with_megatron(tmp_path / "a", 60000, cut())
    shutil.copy(tmp_path / "a.bin", tmp_path / "b.bin")
    shutil.copy(tmp_path / "a.idx", tmp_path / "b.idx")
    merged = IndexedDataset(merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "merged")))
    texts = [text.tolist() for text in documents(60000)]
    assert [merged.document(number).tolist() for number in range(merged.num_documents)] == texts + texts


def test_the_sidecar_counts_what_was_set_aside(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write("bad\n")
    (prefix,) = preprocess([str(corpus)], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip")
    for ending in FILES:
        shutil.copy(f"{prefix}{ending}", tmp_path / f"copy{ending}")
    merge([prefix, str(tmp_path / "copy")], str(tmp_path / "merged"))
    sidecar = json.loads((tmp_path / "merged.json").read_text())
    assert (sidecar["documents"], sidecar["bad_records"], sidecar["empty_documents"]) == (80, 2, 12)


def test_a_merge_that_fails_leaves_the_old_dataset(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "a", 60000, whole())
    with IndexedDatasetWriter(tmp_path / "merged", np.uint16) as writer:
        writer.add_document(np.arange(5))
        writer.finish()
    (tmp_path / "b.idx").write_bytes((tmp_path / "a.idx").read_bytes())
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"b\.bin: 1420 bytes found, 1422 expected"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "merged"))
    assert IndexedDataset(tmp_path / "merged").document(0).tolist() == list(range(5))
    assert not list(tmp_path.glob("*.tmp-*"))
