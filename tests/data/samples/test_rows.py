"""Packs side by side in a row, and positions that skip ahead, against what their definitions say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.data import Data
from megalong.config.mixture import Pose
from megalong.data.inspect_samples import positions_of, targets_of
from megalong.data.samples.pose import skipped_positions
from megalong.data.samples.sampler import PackedSamples
from tests.data.samples.test_packed_samples import dataset, entry

LENGTHS = [int(n) for n in np.random.default_rng(1).integers(1, 60, 64)]


def short(path: Path, length: int | None = 8, weight: float = 1.0, name: str = "short") -> SimpleNamespace:
    one = entry(path, weight, name)
    one.seq_length = length
    return one


def packs(tmp_path: Path, packing: str, length: int = 8) -> PackedSamples:
    return PackedSamples([short(dataset(tmp_path / "a", LENGTHS), length)], 32, 3, "100,0", packing=packing)


@pytest.mark.parametrize("packing", ["naive", "masked"])
def test_an_epoch_of_packs_holds_every_token_once(tmp_path: Path, packing: str) -> None:
    lengths = [*LENGTHS, 99 - sum(LENGTHS) % 32]
    lengths[-1] += -sum(lengths) % 32
    samples = PackedSamples([short(dataset(tmp_path / "a", lengths))], 32, 3, "100,0", packing=packing)
    rows = sum(lengths) // 32
    seen = np.concatenate([samples.row(k).tokens[:-1] for k in range(rows)])
    assert len(set(seen.tolist())) == len(seen) == sum(lengths)
    assert samples.describe(rows)[0].epochs == 1


@pytest.mark.parametrize("packing", ["naive", "masked", "best_fit", "whole"])
def test_packs_are_apart(tmp_path: Path, packing: str) -> None:
    """A token tells its document and place; a target and what it is predicted from lie in one pack and one stretch."""
    samples = packs(tmp_path, packing)
    some = 0
    for k in range(30):
        sample = samples.read(k)
        tokens, targets, positions = sample.tokens[:], targets_of(sample, True), positions_of(sample, True)
        np.testing.assert_array_equal(tokens, samples.row(k).tokens[:])
        np.testing.assert_array_equal(tokens[5:19], sample.tokens[5:19])
        assert set(range(0, 32, 8)) <= set(sample.documents.tolist())
        assert not targets[::8].any()
        assert (positions[::8] == 0).all()
        assert positions.max() < 8
        for place in np.flatnonzero(targets):
            same = tokens[place] - tokens[place - 1] == 1
            assert same or packing == "naive"
            some += 1
        assert samples.row(k).document_tokens == samples.row(k).lengths.sum()
    assert some > 30 * 8


def test_best_fit_packs_hold_every_target_of_an_epoch_once(tmp_path: Path) -> None:
    samples = packs(tmp_path, "best_fit")
    stream = samples.streams[0]
    rows = stream._count(0) // 4  # type: ignore[attr-defined]
    learnt = [
        int(token)
        for sample in (samples.read(k) for k in range(rows))
        for token in sample.tokens[targets_of(sample, True)]
    ]
    wanted = sum(length - 1 for length in LENGTHS)
    assert len(set(learnt)) == len(learnt)
    assert wanted - 4 * 8 <= len(learnt) <= wanted


@pytest.mark.parametrize("packing", ["naive", "masked", "best_fit"])
def test_weights_are_shares_of_tokens_beside_packs(tmp_path: Path, packing: str) -> None:
    path = dataset(tmp_path / "a", LENGTHS)
    mixture = [short(path, None, 0.15, "long"), short(path, 8, 0.85)]
    samples = PackedSamples(mixture, 32, 3, "80,20", packing=packing)
    held = {"long": 0, "short": 0}
    for k in range(1000):
        held[samples.domain_of(k)] += samples.row(k).document_tokens if packing == "best_fit" else 32
    assert held["long"] / sum(held.values()) == pytest.approx(0.15, abs=3e-3)
    if packing == "naive":
        long = next(k for k in range(1000) if samples.domain_of(k) == "long")
        assert samples.read(long).documents.tolist() == [0]
    validation = PackedSamples(mixture, 32, 3, "80,20", "validation", packing=packing)
    documents = [
        {int(token) // 100 for k in range(200) for token in one.read(k).tokens[: one.row(k).filled]}
        for one in (samples, validation)
    ]
    if packing != "best_fit":  # zeros between packs would count as document 0
        assert not documents[0] & documents[1]


def test_lengths_that_do_not_divide_are_told() -> None:
    domain = {"name": "a", "path": "a", "weight": 1.0}
    with pytest.raises(ValueError, match=r"a: seq_length 12 does not divide data\.seq_length 32.* such as 8"):
        Data(seq_length=32, mixture=[{**domain, "seq_length": 12}])
    with pytest.raises(ValueError, match="such as 32"):
        Data(seq_length=32, mixture=[{**domain, "seq_length": 64}])
    assert Data(seq_length=32, mixture=[{**domain, "seq_length": 8}]).masked
    with pytest.raises(ValueError, match=r"target_length 32 is not above data\.seq_length 32"):
        Data(seq_length=32, mixture=[domain], pose={"target_length": 32})


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 300),
    chunks=st.integers(2, 6),
    more=st.integers(1, 10**6),
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(0, 299),
)
def test_skipped_positions_are_those_of_pose(length: int, chunks: int, more: int, seed: int, cut: int) -> None:
    starts = np.unique(np.array([0, min(cut, length)]))
    pose = Pose(target_length=length + more, chunks=chunks)
    found = skipped_positions(starts, length, pose, seed, 7)
    np.testing.assert_array_equal(found, skipped_positions(starts, length, pose, seed, 7))
    for one in np.split(found, starts[1:]):
        if len(one):
            assert one[0] == 0
            assert one.max() < pose.target_length
            assert (np.diff(one) >= 1).all()
            assert (np.diff(one) > 1).sum() < chunks


def test_pose_reaches_the_target_length(tmp_path: Path) -> None:
    mixture = [entry(dataset(tmp_path / "a", LENGTHS))]
    pose = Pose(target_length=1000)
    samples = PackedSamples(mixture, 32, 3, "90,10", pose=pose)
    lasts = [int(samples.read(k).positions[-1]) for k in range(400)]  # type: ignore[index]
    assert min(lasts) < 100
    assert 900 < max(lasts) < 1000
    assert np.mean(lasts) == pytest.approx(31 + 968 / 2, rel=0.1)
    masked = PackedSamples(mixture, 32, 3, "90,10", packing="masked", pose=pose)
    sample = masked.read(0)
    assert (sample.positions[sample.documents[sample.documents < 32]] == 0).all()  # type: ignore[index]
