"""The order of an epoch is shuffled by one rank and mapped by the others, and never outlives its dataset."""

import os
from pathlib import Path

import numpy as np
import pytest

from megalong.config.mixture import Domain
from megalong.data import IndexedDatasetWriter, PackedSamples
from megalong.data.stream import DomainStream


def dataset(prefix: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            writer.add_document(rng.integers(0, 500, rng.integers(1, 30)))
        writer.finish()
    return prefix


def samples(paths: list[Path], index: Path | None) -> PackedSamples:
    mixture = [Domain(name=path.name, path=str(path), weight=1.0) for path in paths]
    return PackedSamples(mixture, 16, 1234, "90,10", index_folder=index)


def test_prepared_samples_are_the_same_and_nobody_else_shuffles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [dataset(tmp_path / name, seed) for seed, name in enumerate("ab")]
    plain = [samples(paths, None).sample(k) for k in range(200)]
    samples(paths, tmp_path / "index").prepare(0, 200)

    def refuse(self: DomainStream, *what: int) -> None:
        raise AssertionError(f"{what} was shuffled again")

    monkeypatch.setattr(DomainStream, "_shuffled", refuse)
    monkeypatch.setattr(DomainStream, "_permuted", refuse)
    mapped = samples(paths, tmp_path / "index")
    for k, expected in enumerate(plain):
        np.testing.assert_array_equal(mapped.sample(k), expected)
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
        np.testing.assert_array_equal(renewed.sample(k), samples([path], None).sample(k))


def test_a_damaged_index_is_none(tmp_path: Path) -> None:
    path, index = dataset(tmp_path / "a", 0), tmp_path / "index"
    expected = samples([path], None).sample(3)
    samples([path], index).prepare(0, 5)
    for file in index.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-30])
    np.testing.assert_array_equal(samples([path], index).sample(3), expected)
