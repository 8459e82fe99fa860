"""Best-fit packing against counting tokens, an item-by-item best fit, and the fewest bins there can be."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.layout import TokenLayout
from megalong.config.mixture import Lengths
from megalong.data.samples.bins import best_fit
from megalong.data.samples.sampler import PackedSamples
from megalong.errors import UserError
from tests.batches.whole import shard_samples
from tests.data.samples.test_packed_samples import dataset

S = 32
LENGTHS = [5, 33, 32, 1, 34, 0, 90, 65, 12, 17, 9, 9, 3, 28, 2, 40]


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    """Bins that best-fit decreasing needs, one item after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        room = min(fits) if fits else capacity
        if fits:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80))
def test_bins_are_those_of_best_fit_decreasing(lengths: list[int]) -> None:
    bin_of, bins = best_fit(np.array(lengths, np.int64), 40)
    filled = np.bincount(bin_of, np.array(lengths), bins) if lengths else np.zeros(0)
    assert np.all(filled <= 40)
    assert np.all(filled > 0)
    assert bins == plain_best_fit(lengths, 40)


def packed(path: Path, packing: str, rules: Lengths | None = None, **named: Any) -> PackedSamples:
    mixture = [SimpleNamespace(name="a", path=str(path), weight=1, lengths=rules)]
    return PackedSamples(mixture, S, 5, "1,0", packing=packing, **named)


def epoch(samples: PackedSamples, number: int = 0) -> list[int]:
    """Numbers of the samples that make up an epoch."""
    stream: Any = samples.streams[0]
    first = sum(stream._count(e) for e in range(number))
    return list(range(first, first + stream._count(number)))


def pieces(samples: PackedSamples, k: int) -> list[list[int]]:
    """The tokens of sample k, document by document, without padding."""
    tokens, filled = samples.row(k).tokens[:], samples.row(k).filled
    starts = [start for start in samples.row(k).starts.tolist() if start < filled]
    return [tokens[a:b].tolist() for a, b in zip(starts, [*starts[1:], filled], strict=True)]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_epoch_holds_every_target_once_and_cuts_nothing_that_fits(tmp_path: Path, number: int) -> None:
    samples = packed(dataset(tmp_path / "a", LENGTHS), "best_fit")
    targets: Counter[int] = Counter()
    for k in epoch(samples, number):
        assert samples.row(k).tokens[:].shape == (S + 1,)
        assert np.all(samples.row(k).tokens[samples.row(k).filled :] == 0)
        for piece in pieces(samples, k):
            assert piece == list(range(piece[0], piece[0] + len(piece))), "a piece is tokens of one document in a row"
            targets.update(piece[1:])
            length = LENGTHS[piece[0] // 100]
            assert len(piece) == length if length <= S + 1 else len(piece) <= S + 1
    wanted = [100 * d + t for d, length in enumerate(LENGTHS) for t in range(1, length)]
    assert sorted(targets.elements()) == wanted


def test_whole_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    samples = packed(dataset(tmp_path / "a", LENGTHS), "whole")
    seen = sorted(tuple(piece) for k in epoch(samples) for piece in pieces(samples, k))
    fits = [d for d, length in enumerate(LENGTHS) if 0 < length <= S + 1]
    assert seen == [tuple(range(100 * d, 100 * d + LENGTHS[d])) for d in fits]
    assert not any(any(samples.row(k).cuts) for k in epoch(samples))
    with pytest.raises(UserError, match="none of the 3 documents of a/train has 1 to 33 tokens"):
        packed(dataset(tmp_path / "b", [34, 80, 99]), "whole")


def test_cuts_are_told(tmp_path: Path) -> None:
    samples = packed(dataset(tmp_path / "a", LENGTHS), "best_fit")
    for k in epoch(samples):
        found = pieces(samples, k)
        begun = any(piece[0] % 100 for piece in found)
        goes_on = any(piece[-1] % 100 + 1 < LENGTHS[piece[0] // 100] for piece in found)
        assert samples.row(k).cuts == (begun, goes_on)


def test_epochs_differ_and_length_rules_hold(tmp_path: Path) -> None:
    rules = Lengths(below=10, keep=0.5, above=30, repeat=2)
    samples = packed(dataset(tmp_path / "a", LENGTHS), "best_fit", rules)
    counts: Counter[int] = Counter()
    for number in range(4):
        for k in epoch(samples, number):
            counts.update(piece[0] // 100 for piece in pieces(samples, k) if piece[0] % 100 == 0)
    for document, length in enumerate(LENGTHS):
        wanted = {0: [0]}.get(length) or ([1, 2, 3] if length < 10 else [8] if length > 30 else [4])
        assert counts[document] in wanted
    first, second = (sorted(samples.row(k).tokens[:].tolist() for k in epoch(samples, number)) for number in (0, 1))
    assert first != second


def test_other_ranks_read_what_one_has_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, index = dataset(tmp_path / "a", LENGTHS), tmp_path / "index"
    fresh = packed(path, "best_fit")
    expected = [(fresh.row(k).tokens[:].tolist(), fresh.row(k).starts.tolist(), fresh.row(k).filled) for k in range(60)]
    packed(path, "best_fit", index_folder=index).prepare(0, 60)

    def refuse(*what: object) -> None:
        raise AssertionError(f"{what} was packed again")

    monkeypatch.setattr("megalong.data.samples.whole_documents.best_fit", refuse)
    mapped = packed(path, "best_fit", index_folder=index)
    assert [
        (mapped.row(k).tokens[:].tolist(), mapped.row(k).starts.tolist(), mapped.row(k).filled) for k in range(60)
    ] == expected


def test_samples_are_shuffled_and_their_order_is_frozen(tmp_path: Path) -> None:
    """Unshuffled, the longest documents come first. A change of these numbers changes the data of resumed runs."""
    samples = packed(dataset(tmp_path / "a", list(range(2, 34))), "best_fit")
    longest = [max(len(piece) for piece in pieces(samples, k)) for k in epoch(samples)]
    assert longest == FROZEN_LONGEST
    assert longest != sorted(longest, reverse=True)


FROZEN_LONGEST = [18, 21, 27, 33, 29, 17, 26, 30, 32, 25, 20, 24, 19, 28, 23, 22, 31]


def test_weights_are_shares_of_tokens_whatever_is_padded(tmp_path: Path) -> None:
    """Samples of `b` are half empty: it needs twice as many for the same tokens."""
    mixture = [
        SimpleNamespace(name="a", path=str(dataset(tmp_path / "a", [11] * 60)), weight=1, lengths=None),
        SimpleNamespace(name="b", path=str(dataset(tmp_path / "b", [17] * 60, first=10**6)), weight=1, lengths=None),
    ]
    samples = PackedSamples(mixture, S, 5, "1,0", packing="best_fit")
    tokens = Counter({"a": 0, "b": 0})
    for k in range(300):
        tokens[samples.domain_of(k)] += samples.row(k).filled
    assert tokens["a"] == pytest.approx(tokens["b"], abs=33)
    a, b = samples.describe(300)
    assert (a.tokens, b.tokens) == (tokens["a"], tokens["b"])


def test_padding_is_no_target_and_a_document_of_its_own(tmp_path: Path) -> None:
    samples = packed(dataset(tmp_path / "a", LENGTHS), "best_fit")
    rows = epoch(samples)
    whole = torch.from_numpy(np.stack([samples.row(k).tokens[:] for k in rows]))
    documents, filled = [samples.row(k).starts for k in rows], [samples.row(k).filled for k in rows]
    batch = shard_samples(whole, TokenLayout(), 0, documents=documents, filled=filled)
    counted = batch.loss_mask.bool()
    found = sorted(batch.labels[counted].tolist())
    assert found == sorted(token for k in rows for piece in pieces(samples, k) for token in piece[1:])
    assert min(filled) < S, "nothing is padded"
    for row, count in enumerate(filled):
        if count <= S:
            assert batch.positions[row, count:].tolist() == list(range(S - count))
    changed = whole.clone()
    for row, count in enumerate(filled):
        changed[row, count:] = 499
    again = shard_samples(changed, TokenLayout(), 0, documents=documents, filled=filled)
    assert torch.equal(again.labels[counted], batch.labels[counted])
    assert torch.equal(again.tokens[counted], batch.tokens[counted])
