"""Joined documents: each comes once, topics stay together, and every machine joins the same ones."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.mixture import Domain
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.samples.sampler import PackedSamples
from megalong.data.synthetic import joining
from megalong.data.synthetic.sketch import KINDS, LENGTH, READ, _kinds, sketched_spans, sketches
from tests.data.samples.test_packed_samples import dataset
from tests.data.samples.test_whole_documents import LENGTHS, epoch

S, TOPICS = 32, 5


def packed(path: Path, seq_length: int = S, **named: Any) -> PackedSamples:
    mixture = [
        Domain(name="a", path=str(path), weight=1.0, lengths=named.pop("lengths", None), synthetic={"task": "related"})
    ]
    return PackedSamples(mixture, seq_length, 5, "1,0", packing=named.pop("packing", "masked"), **named)


@pytest.mark.parametrize("number", [0, 2])
def test_an_epoch_holds_every_target_once_in_samples_of_one_document(tmp_path: Path, number: int) -> None:
    samples = packed(dataset(tmp_path / "a", LENGTHS))
    targets: Counter[int] = Counter()
    for k in epoch(samples, number):
        filled, tokens = samples.row(k).filled, samples.row(k).tokens[:]
        assert samples.row(k).starts.tolist() == ([0, filled] if filled <= S else [0])
        assert samples.read(k).targets is None
        assert not tokens[filled:].any()
        borders = [0, *(np.flatnonzero(np.diff(tokens[:filled]) != 1) + 1).tolist(), filled]
        for first, end in pairwise(borders):
            targets.update(tokens[first + 1 : end].tolist())
            length = LENGTHS[tokens[first] // 100]
            assert end - first == length if length <= S + 1 else end - first <= S + 1
    assert sorted(targets.elements()) == [100 * d + t for d, length in enumerate(LENGTHS) for t in range(1, length)]


def test_little_is_padded_and_rules_hold(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 30, 300).tolist()
    samples = packed(dataset(tmp_path / "a", lengths), 200, lengths={"above": 20, "repeat": 2})
    one = range(len(samples.streams[0]._samples(0)[3]))  # type: ignore[attr-defined]
    assert np.mean([samples.row(k).filled for k in one]) > 0.95 * 201
    tokens = np.concatenate([samples.row(k).tokens[: samples.row(k).filled] for k in one])
    begun = np.bincount(tokens[tokens % 100 == 0] // 100)
    assert all(begun[d] == (2 if length > 20 else 1) for d, length in enumerate(lengths))


def topics(prefix: Path, documents: int = 200, seed: int = 0) -> Path:
    """Documents of 60 tokens: half of them common ones, half of a topic's own 40; the first token names the topic."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for number in range(documents):
            topic = number % TOPICS
            own = 1000 * (topic + 1) + random.integers(0, 40, 60)
            tokens = np.where(random.random(60) < 0.5, random.integers(100, 150, 60), own)
            tokens[0] = topic
            writer.add_document(tokens)
        writer.finish()
    return prefix


def purity(samples: PackedSamples, seq_length: int, count: int) -> float:
    """Share of the documents in samples that are of the topic most of their sample's documents are of."""
    of_most = documents = 0
    for k in range(count):
        tokens = samples.row(k).tokens[: samples.row(k).filled]
        found = np.bincount(tokens[tokens < TOPICS], minlength=TOPICS)
        of_most, documents = of_most + int(found.max()), documents + int(found.sum())
    return of_most / documents


@pytest.mark.parametrize("block", [4096, 32])
def test_what_is_joined_belongs_together(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "BLOCK", block)
    path, seq_length = topics(tmp_path / "a"), 599
    mixture = [Domain(name="a", path=str(path), weight=1.0)]
    plain = PackedSamples(mixture, seq_length, 5, "1,0", packing="best_fit")
    assert purity(plain, seq_length, 20) < 0.5
    assert purity(packed(path, seq_length), seq_length, 20) > (0.95 if block == 4096 else 0.8)


def plain_joined(lengths: list[int], found: np.ndarray, capacity: int) -> list[list[int]]:
    """Text by text, in whole numbers of any size."""
    left, documents = list(range(len(lengths))), []
    while left:
        held = [left.pop(0)]
        while fits := [text for text in left if sum(lengths[one] for one in held) + lengths[text] <= capacity]:
            near = found[held].astype(object).sum(0)
            best = max(fits, key=lambda text: (int(near @ found[text].astype(object)), -text))
            held.append(best)
            left.remove(best)
        documents.append(held)
    return documents


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=14), st.integers(0, 1000))
def test_the_nearest_that_fits_is_next(lengths: list[int], seed: int) -> None:
    found = np.random.default_rng(seed).integers(-200, 200, (len(lengths), 8)).astype(np.int16)
    joined = [one.tolist() for one in joining.joined(np.array(lengths), found, 30)]
    assert joined == plain_joined(lengths, found, 30)


def test_sketches_are_exact_and_of_one_length() -> None:
    """Their products must be whole numbers that float32 holds, in any order of adding."""
    random = np.random.default_rng(0)
    texts = [random.integers(0, 500 + 20 * n, 3 + 15 * n) for n in range(60)]
    found = sketches(60, texts.__getitem__)
    norms = np.sqrt(np.square(found[5:].astype(np.int64)).sum(1))
    np.testing.assert_allclose(norms, LENGTH, rtol=0.02)
    wide = found.astype(np.float32)
    order = random.permutation(found.shape[1])
    np.testing.assert_array_equal(wide @ wide.T, found.astype(np.int64) @ found.astype(np.int64).T)
    np.testing.assert_array_equal(wide[:, order] @ wide[:, order].T, wide @ wide.T)
    kinds = _kinds(np.arange(30000))
    assert len(kinds) == pytest.approx(KINDS * (1 - np.exp(-30000 / KINDS)), rel=0.01), "kinds are evenly dealt"


def test_long_texts_are_read_in_two_places() -> None:
    assert list(sketched_spans(READ)) == [(0, READ)]
    for length in (READ + 1, 3 * READ, 10**6):
        (first, count), (second, more) = sketched_spans(length)
        assert (first, count) == (0, READ // 2)
        assert count <= second
        assert second + more <= length


def test_other_ranks_read_what_one_has_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, index = dataset(tmp_path / "a", LENGTHS), tmp_path / "index"
    mixture = [Domain(name="a", path=str(path), weight=1.0)]
    PackedSamples(mixture, S, 5, "1,0", packing="best_fit", index_folder=index).prepare(0, 40)
    fresh = packed(path)
    expected = [(fresh.row(k).tokens[:].tolist(), fresh.row(k).starts.tolist(), fresh.row(k).filled) for k in range(40)]
    packed(path, index_folder=index).prepare(0, 40)

    def refuse(*what: object) -> None:
        raise AssertionError(f"{what} was joined again")

    monkeypatch.setattr("megalong.data.synthetic.related.joined", refuse)
    mapped = packed(path, index_folder=index)
    assert [
        (mapped.row(k).tokens[:].tolist(), mapped.row(k).starts.tolist(), mapped.row(k).filled) for k in range(40)
    ] == expected
