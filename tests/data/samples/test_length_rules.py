"""Length rules against counting: what the first epochs hold of every document, whatever the lengths and the rules."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megalong.config.mixture import Domain, Lengths
from megalong.data.indexed import IndexedDataset
from megalong.data.samples.epochs import Epochs
from megalong.data.samples.length_rules import length_classes
from megalong.data.samples.sampler import PackedSamples
from megalong.data.samples.stream import DomainStream
from megalong.errors import UserError
from tests.data.samples.test_packed_samples import dataset

RATIOS = st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 1.0, 1.7, 2.0, 2.5, 3.0]) | st.floats(0.05, 4)


def held(lengths: np.ndarray, rules: Lengths, epochs: int, seed: int = 0) -> np.ndarray:
    """int [epochs, documents]: how often each epoch holds each document."""
    made = Epochs(length_classes(np.arange(len(lengths)), lengths, rules, np.random.RandomState(seed), "a/train"))
    orders = [made.shuffled(epoch, np.random.RandomState([seed, epoch])) for epoch in range(epochs)]
    assert [made.start(e) for e in range(epochs)] == [
        int(sum(lengths[o].sum() for o in orders[:e])) for e in range(epochs)
    ]
    return np.array([np.bincount(order, minlength=len(lengths)) for order in orders])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=60),
    RATIOS.map(lambda r: r % 1),
    RATIOS,
    st.integers(0, 2**32 - 1),
)
def test_every_class_gets_its_tokens_and_every_document_its_turn(
    tokens: list[int], keep: float, repeat: float, seed: int
) -> None:
    lengths = np.array(tokens)
    rules = Lengths(drop_below=5, below=20, keep=keep, above=50, repeat=repeat, drop_above=90)
    assume(((lengths >= (20 if keep == 0 else 5)) & (lengths <= 90)).any())
    counts = held(lengths, rules, 9, seed).cumsum(0)
    expected = np.select([lengths < 5, lengths < 20, lengths <= 50, lengths <= 90], [0, keep, 1, repeat], 0.0)
    for ratio in set(expected.tolist()):
        members = np.flatnonzero(expected == ratio)
        # keep and repeat may be equal: then two circles share a ratio, each with its own rounding.
        for circle in (members[lengths[members] < 20], members[lengths[members] >= 20]):
            if len(circle) == 0:
                continue
            for epochs, seen in enumerate(counts[:, circle], 1):
                wanted = epochs * ratio * lengths[circle].sum()
                circles = 2 if ratio == 1 else 1
                assert abs(seen @ lengths[circle] - wanted) <= circles * lengths[circle].max() / 2 + 1e-6
                assert seen.max() - seen.min() <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=2, max_size=60), st.floats(0.05, 0.95), st.floats(0, 0.9))
def test_a_share_is_the_share_of_tokens(tokens: list[int], share: float, keep: float) -> None:
    lengths = np.array(tokens)
    long = lengths > 50
    assume(long.any() and ((lengths >= 20) & ~long).any())
    rules = Lengths(below=20, keep=keep, above=50, share=share)
    drawn = held(lengths, rules, 40).sum(0) * lengths
    per_epoch = (1 - share) ** -1 * (keep * lengths[lengths < 20].sum() + lengths[(lengths >= 20) & ~long].sum())
    assert abs(drawn.sum() - 40 * per_epoch) <= 100 + 1e-6
    assert abs(drawn[long].sum() - 40 * share * per_epoch) <= 50 + 1e-6


def test_what_comes_twice_comes_once_in_each_half() -> None:
    lengths = np.array([10] * 50 + [100] * 50)
    made = Epochs(
        length_classes(np.arange(len(lengths)), lengths, Lengths(above=50, repeat=2), np.random.RandomState(0), "a")
    )
    order = made.shuffled(3, np.random.RandomState(1))
    long = order[order >= 50]
    assert sorted(long[:50].tolist()) == sorted(long[50:].tolist()) == list(range(50, 100))
    assert long[:50].tolist() != long[50:].tolist()
    assert np.mean(order[: len(order) // 2] < 50) == pytest.approx(1 / 3, abs=0.12)


RULES = [
    Lengths(below=10, keep=0.3, above=30, repeat=2.5),
    Lengths(drop_below=3, drop_above=39, above=20, share=0.8),
    Lengths(below=40, keep=0.01, drop_above=40),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("seq_length", [1, 7, 50, 997])
def test_samples_are_slices_of_the_concatenated_epochs(tmp_path: Path, rules: Lengths, seq_length: int) -> None:
    lengths = [3, 0, 40, 1, 20, 0, 35, 1, 12, 22, 40]
    data = IndexedDataset(dataset(tmp_path / "a", lengths))
    stream = DomainStream(data.prefix, seq_length, "1,0", "train", 5, "a", rules)
    orders = [stream.order(epoch).tolist() for epoch in range(260)]
    ids = [number for order in orders for number in order]
    whole = np.concatenate([data.document(number) for number in ids])
    begins = np.cumsum([0] + [lengths[number] for number in ids])
    again = DomainStream(data.prefix, seq_length, "1,0", "train", 5, "a", rules)
    for j in (2, 0, 1):
        start = again.place_of(j) * seq_length
        np.testing.assert_array_equal(again.piece(j).tokens[:], whole[start : start + seq_length + 1])
        inside = begins[(begins > start) & (begins <= start + seq_length)] - start
        np.testing.assert_array_equal(again.piece(j).starts, [0, *inside])


def mixture(path: Path, **rules: Any) -> list[Domain]:
    return [Domain(name="a", path=str(path), weight=1.0, lengths=Lengths(**rules))]


def test_upsampling_never_leaks_held_out_documents(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(2).integers(1, 60, 80)]
    entries = mixture(dataset(tmp_path / "a", lengths), below=20, keep=0.5, above=30, repeat=3)
    parts = [PackedSamples(entries, 8, 1, "80,20", part) for part in ("train", "validation")]
    seen = [{int(token) // 100 for k in range(1200) for token in packed.row(k).tokens[:]} for packed in parts]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(80)), "what is kept by halves gets its turn"


def test_a_cap_on_repeats_counts_what_is_really_shown(tmp_path: Path) -> None:
    lengths = [40] * 10 + [8] * 40
    path = dataset(tmp_path / "a", lengths)
    for samples in (1, 20, 150, 151, 400):
        entries = mixture(path, above=20, repeat=2, max_repeats=4)
        packed = PackedSamples(entries, 8, 3, "1,0")
        shown = Counter(int(token) for k in range(samples) for token in packed.row(k).tokens[:-1])
        most = packed.streams[0].most_repeats(samples)
        assert max(shown.values()) <= most
        if most > 4:
            with pytest.raises(UserError, match=f"a: this run shows documents up to {most} times.*allows 4"):
                packed.refuse_repeats(samples)
        else:
            packed.refuse_repeats(samples)
    assert most > 4
    for seed in range(5):  # the first sample of a block that begins in the third epoch and ends in the fourth
        packed = PackedSamples(mixture(path, above=20, repeat=2), 9, seed, "1,0")
        shown = Counter(int(token) for k in range(373) for token in packed.row(k).tokens[:-1])
        assert max(shown.values()) <= packed.streams[0].most_repeats(373)
    assert PackedSamples(mixture(path, max_repeats=1), 8, 3, "1,0").refuse_repeats(90) is None
    with pytest.raises(UserError, match="up to 2 times"):
        PackedSamples(mixture(path, max_repeats=1), 8, 3, "1,0").refuse_repeats(91)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"drop_below": 1000}, "the lengths rules leave none of the 20 documents of a/train"),
        ({"below": 1000, "keep": 0}, "leave none"),
        ({"above": 1000, "share": 0.5}, "lengths.share 0.5 of a/train is impossible: no document is longer than 1000"),
        ({"above": 1, "share": 0.5}, "every document is longer than 1 tokens"),
    ],
)
def test_impossible_rules_are_told(tmp_path: Path, rules: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        PackedSamples(mixture(dataset(tmp_path / "a", [5] * 20), **rules), 8, 1, "1,0")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({}, "contains no rule"),
        ({"below": 4096}, "below and keep belong together"),
        ({"keep": 0.1, "max_repeats": 1}, "below and keep belong together"),
        ({"above": 4096}, "above belongs with repeat or share"),
        ({"share": 0.5, "drop_above": 9}, "above belongs with repeat or share"),
        ({"above": 4096, "repeat": 2, "share": 0.5}, "write one of them"),
        ({"below": 4096, "keep": 0.1, "above": 4095, "repeat": 2}, "below 4096 and above 4095 leave no length between"),
        ({"drop_below": 8, "below": 8, "keep": 0.1}, "drop_below 8 and below 8 leave no length"),
        ({"below": 8, "keep": 1.0}, "less than 1"),
        ({"above": 8, "repeat": 0.0}, "greater than 0"),
    ],
)
def test_rules_that_say_nothing_or_contradict_are_told(rules: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Lengths(**rules)


def test_rules_change_nothing_where_they_ask_for_nothing(tmp_path: Path) -> None:
    """A rule that no document meets leaves the frozen orders of a run without rules."""
    path = dataset(tmp_path / "a", [5] * 30)
    plain = PackedSamples([SimpleNamespace(name="a", path=str(path), weight=1, lengths=None)], 8, 1, "1,0")
    ruled = PackedSamples(mixture(path, drop_above=100, above=50, repeat=2.5), 8, 1, "1,0")
    for k in range(60):
        np.testing.assert_array_equal(plain.row(k).tokens[:], ruled.row(k).tokens[:])
