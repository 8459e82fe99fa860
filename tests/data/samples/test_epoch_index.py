"""The order of an epoch is shuffled by one rank and mapped by the others, and never outlives its dataset."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megalong.config.mixture import Domain, Lengths
from megalong.data import IndexedDatasetWriter, PackedSamples
from megalong.data.indexed import IndexedDataset
from megalong.data.samples.stream import DomainStream
from megalong.errors import UserError


def dataset(prefix: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            writer.add_document(rng.integers(0, 500, rng.integers(1, 30)))
        writer.finish()
    return prefix


def samples(paths: list[Path], index: Path | None) -> PackedSamples:
    rules = [None, Lengths(below=10, keep=0.3, above=20, repeat=2)]
    mixture = [
        Domain(name=path.name, path=str(path), weight=1.0, lengths=rule)
        for path, rule in zip(paths, rules, strict=False)
    ]
    return PackedSamples(mixture, 16, 1234, "90,10", index_folder=index)


def test_prepared_samples_are_the_same_and_nobody_else_shuffles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [dataset(tmp_path / name, seed) for seed, name in enumerate("ab")]
    plain = [samples(paths, None).row(k).tokens[:] for k in range(200)]
    samples(paths, tmp_path / "index").prepare(0, 200)

    def refuse(*what: object) -> None:
        raise AssertionError(f"{what} was made again")

    for name in ("_classes", "_shuffled", "_permuted"):
        monkeypatch.setattr(DomainStream, name, refuse)
    monkeypatch.setattr(IndexedDataset, "_check_index", refuse)
    monkeypatch.setattr(IndexedDataset, "document_starts", property(refuse))
    mapped = samples(paths, tmp_path / "index")
    for k, expected in enumerate(plain):
        np.testing.assert_array_equal(mapped.row(k).tokens[:], expected)
    mapped.prepare(0, 200)


def test_a_dataset_made_anew_gets_a_new_index(tmp_path: Path) -> None:
    path, index = dataset(tmp_path / "a", 0), tmp_path / "index"
    samples([path], index).prepare(0, 50)
    old = set(index.iterdir())
    dataset(path, 1)
    later = path.with_suffix(".bin").stat().st_mtime_ns + 10**9
    os.utime(path.with_suffix(".bin"), ns=(later, later))
    renewed = samples([path], index)
    renewed.prepare(0, 50)
    assert len(set(index.iterdir()) - old) == len(old)
    for k in range(50):
        np.testing.assert_array_equal(renewed.row(k).tokens[:], samples([path], None).row(k).tokens[:])


def test_only_the_sidecar_tells_that_a_dataset_was_tokenized_anew(tmp_path: Path) -> None:
    """Same sizes, same times of change, other ids: another tokenizer with as many tokens, copied with its times."""
    path, index = dataset(tmp_path / "a", 0), tmp_path / "index"
    sidecar = {"format": 1, "documents": 40, "tokens": IndexedDataset(path).num_tokens}
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"tokenizer": {"name": "x", "sha256": "x"}}))
    samples([path], index).prepare(0, 50)
    old = set(index.iterdir())
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"tokenizer": {"name": "y", "sha256": "y"}}))
    samples([path], index).prepare(0, 50)
    assert len(set(index.iterdir()) - old) == len(old)


@pytest.mark.parametrize(("seed", "split", "rule"), [(1, "90,10", None), (1234, "80,20", None), (1234, "90,10", "cap")])
def test_whatever_an_order_follows_from_is_in_its_key(tmp_path: Path, seed: int, split: str, rule: str | None) -> None:
    path, index = dataset(tmp_path / "a", 0), tmp_path / "index"
    samples([path], index).prepare(0, 50)
    old = set(index.iterdir())
    rules = Lengths(drop_above=20) if rule else None
    other = [Domain(name="a", path=str(path), weight=1.0, lengths=rules)]
    kept, fresh = (PackedSamples(other, 16, seed, split, index_folder=folder) for folder in (index, None))
    kept.prepare(0, 50)
    assert len(set(index.iterdir()) - old) >= len(old)
    for k in range(50):
        np.testing.assert_array_equal(kept.row(k).tokens[:], fresh.row(k).tokens[:])


def test_what_was_checked_once_and_then_cut_is_still_told(tmp_path: Path) -> None:
    path, index = dataset(tmp_path / "a", 0), tmp_path / "index"
    samples([path], index).prepare(0, 50)
    tokens = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(tokens[:-2])
    with pytest.raises(UserError, match="truncated"):
        samples([path], index)
    with pytest.raises(UserError, match="truncated"):
        IndexedDataset(path, checked=True)


def test_a_damaged_index_is_none(tmp_path: Path) -> None:
    path, index = dataset(tmp_path / "a", 0), tmp_path / "index"
    expected = samples([path], None).row(3).tokens[:]
    samples([path], index).prepare(0, 5)
    for file in index.glob("*/*.npy"):
        file.write_bytes(file.read_bytes()[:-30])
    renewed = samples([path], index)
    np.testing.assert_array_equal(renewed.row(3).tokens[:], expected)
    renewed.prepare(0, 5)
    assert all(np.load(file, mmap_mode="r") is not None for file in index.glob("*/*.npy"))
