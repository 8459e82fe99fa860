"""Packed samples against a brute-force concatenation, and blending against Megatron-Core's compiled helper."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.samples.blending import Blend
from megalong.data.samples.sampler import PackedSamples
from megalong.data.samples.splitting import documents_of_part
from megalong.data.samples.stream import DomainStream
from megalong.errors import UserError

WEIGHTS = [[1.0], [0.7, 0.3], [1, 1, 1], [0.3, 0.3, 0.1, 0.1, 0.04, 0.04, 0.03, 0.03, 0.03, 0.03], [1e-4, 5]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blending_is_megatrons(weights: list[float]) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    shares = np.array(weights, np.float64) / np.sum(weights)
    domains, indices = np.zeros(5000, np.int16), np.zeros(5000, np.int64)
    helpers.build_blending_indices(domains, indices, shares, len(weights), 5000, False)
    blend = Blend(weights)
    asked = np.random.default_rng(0).permutation(5000).tolist()
    found = {k: blend.of(k) for k in asked}
    assert [found[k] for k in range(5000)] == list(zip(domains.tolist(), indices.tolist(), strict=True))
    np.testing.assert_array_equal(blend.counts(777), np.bincount(domains[:777], minlength=len(weights)))


def dataset(prefix: Path, lengths: list[int], first: int = 0, sidecar: dict[str, object] | None = None) -> Path:
    """Document d is the tokens 100·d + first, +1, …: every token tells where it comes from."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for number, length in enumerate(lengths):
            writer.add_document(first + 100 * number + np.arange(length))
        writer.finish(sidecar)
    return prefix


def entry(path: Path, weight: float = 1.0, name: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name or path.name, path=str(path), weight=weight, lengths=None)


@pytest.mark.parametrize("seq_length", [1, 4, 50, 997])
def test_samples_are_slices_of_the_concatenated_epochs(tmp_path: Path, seq_length: int) -> None:
    """Epochs of 100 tokens: sequences shorter and far longer than an epoch, documents empty and of one token."""
    data = IndexedDataset(dataset(tmp_path / "a", [3, 0, 40, 1, 20, 0, 35, 1]))
    stream = DomainStream(data.prefix, seq_length, "1,0", "train", 5, "a")
    orders = [stream.order(epoch).tolist() for epoch in range(60)]
    assert all(sorted(order) == [0, 2, 3, 4, 6, 7] for order in orders)
    assert len({tuple(order) for order in orders}) > 40
    whole = np.concatenate([data.document(number) for order in orders for number in order])
    samples = [stream.piece(j).tokens[:] for j in range(5)]
    for sample, j in zip(samples, (stream.place_of(k) for k in range(5)), strict=True):
        assert sample.dtype == np.int64
        np.testing.assert_array_equal(sample, whole[j * seq_length : (j + 1) * seq_length + 1])


def test_blocks_of_samples_are_shuffled_pieces(tmp_path: Path) -> None:
    """Each block of an epoch's pieces comes once, not in the order of the stream, and no two blocks alike."""
    stream = DomainStream(str(dataset(tmp_path / "a", [50] * 20)), 10, "1,0", "train", 5, "a")
    pieces = np.array([stream.place_of(j) for j in range(300)]).reshape(3, 100)
    for block, order in enumerate(pieces - np.arange(0, 300, 100)[:, None]):
        assert sorted(order.tolist()) == list(range(100)), block
        assert np.mean(np.abs(np.diff(order)) == 1) < 0.1
    assert len({tuple(order % 100) for order in pieces}) == 3


def test_every_token_of_an_epoch_is_a_target_or_input_exactly_once(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(0, 90, 64)]
    lengths[0] += -sum(lengths) % 16
    samples = PackedSamples([entry(dataset(tmp_path / "a", lengths))], 16, seed=3, split="100,0")
    epoch = np.concatenate([samples.row(k).tokens[:-1] for k in range(sum(lengths) // 16)])
    data = IndexedDataset(tmp_path / "a")
    assert sorted(epoch.tolist()) == sorted(data.read(0, data.num_tokens).tolist())


def test_random_access_seed_and_part(tmp_path: Path) -> None:
    mixture = [
        entry(dataset(tmp_path / "a", [30] * 40), 0.7),
        entry(dataset(tmp_path / "b", [9] * 50, first=100000), 0.3),
    ]

    def made(seed: int, part: str = "train") -> PackedSamples:
        return PackedSamples(mixture, 8, seed, "80,20", part)

    one, other = made(1), made(1)
    forwards = [one.row(k).tokens[:] for k in range(300)]
    backwards = [other.row(k).tokens[:] for k in reversed(range(300))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert not np.array_equal(forwards, [made(2).row(k).tokens[:] for k in range(300)])
    domains = [one.domain_of(k) for k in range(300)]
    assert domains == ["a" if sample[0] < 100000 else "b" for sample in forwards]
    assert domains.count("a") == 210
    train = {int(token) for sample in forwards for token in sample}
    validation = made(2, "validation")
    held_out = {int(token) for k in range(300) for token in validation.row(k).tokens[:]}
    assert not train & held_out
    assert len(train | held_out) == 40 * 30 + 50 * 9


def test_a_dataset_listed_twice_holds_out_the_same_documents(tmp_path: Path) -> None:
    path = dataset(tmp_path / "a", [10] * 50)
    mixture = [entry(path, 1, "short"), entry(path, 1, "long")]
    samples, held_out = (PackedSamples(mixture, 8, 1, "80,20", part) for part in ("train", "validation"))
    seen = {int(token) for k in range(400) for token in samples.row(k).tokens[:]}
    assert not seen & {int(token) for k in range(400) for token in held_out.row(k).tokens[:]}
    assert not np.array_equal(samples.row(0).tokens[:], samples.row(1).tokens[:]), (
        "two entries walk the dataset in different orders"
    )


def test_describe_counts_tokens_and_epochs(tmp_path: Path) -> None:
    mixture = [entry(dataset(tmp_path / "a", [30] * 40), 3), entry(dataset(tmp_path / "b", [9] * 50), 1)]
    a, b = PackedSamples(mixture, 8, 1, "100,0").describe(400)
    assert (a.samples, a.tokens, a.epochs, a.documents) == (300, 2400, 2.0, 40)
    assert (b.samples, b.tokens, b.tokens_per_epoch) == (100, 800, 450)
    assert str(a) == "a: 300 samples, 2,400 tokens, 2 epochs of 1,200 tokens in 40 documents"


def test_orders_are_frozen(tmp_path: Path) -> None:
    """A change of these numbers changes the data of every resumed run and leaks its held-out documents."""
    stream = DomainStream(str(dataset(tmp_path / "a", [1] * 8)), 1, "1,0", "train", 1234, "a")
    assert [stream.order(epoch).tolist() for epoch in (0, 1)] == FROZEN_ORDERS
    assert [stream.place_of(j) for j in range(8)] == FROZEN_PIECES
    assert documents_of_part(20, "80,20", "validation", "a").tolist() == FROZEN_SPLIT


FROZEN_ORDERS = [[3, 0, 1, 6, 5, 7, 4, 2], [1, 4, 6, 5, 0, 2, 7, 3]]
FROZEN_PIECES = [7, 5, 3, 1, 6, 2, 0, 4]
FROZEN_SPLIT = [9, 15, 17, 19]


@pytest.mark.parametrize(
    ("split", "part", "told"),
    [
        ("99,1", "validation", r"leaves none for validation \(20 train, 0 validation\)"),
        ("1,99", "train", r"leaves none for train \(0 train, 20 validation\)"),
        ("99", "train", "must be two numbers"),
        ("0,1", "train", "needs a positive share for training"),
        ("9,-1", "train", "none below zero"),
        ("a,b", "train", "must be two numbers"),
    ],
)
def test_impossible_splits_are_told(tmp_path: Path, split: str, part: str, told: str) -> None:
    path = dataset(tmp_path / "a", [5] * 20)
    with pytest.raises(UserError, match=told):
        PackedSamples([entry(path)], 8, 1, split, part)


def described(prefix: Path, sha: str, separator: str | None) -> Path:
    told = {"text": separator, "ids": [0]} if separator else None
    tokenizer = {"name": f"tokenizer-{sha}", "sha256": sha}
    return dataset(prefix, [5] * 20, sidecar={"tokenizer": tokenizer, "separator": told, "vocabulary_size": 515})


def test_separators_and_tokenizers_must_agree(tmp_path: Path) -> None:
    a = entry(described(tmp_path / "a", "x", "<s>"))
    b = entry(described(tmp_path / "b", "y", "<s>"))
    none = entry(described(tmp_path / "none", "x", None))
    foreign = entry(dataset(tmp_path / "megatron", [5] * 20))
    samples = PackedSamples([a, foreign], 8, 1, "99,1", separator="<s>")
    assert samples.tokenizer_sha256 == "x"
    assert samples.vocabulary_size == 515
    assert PackedSamples([foreign], 8, 1, "99,1").vocabulary_size is None
    with pytest.raises(UserError, match="'tokenizer-x' and 'b' with 'tokenizer-y'"):
        PackedSamples([a, b], 8, 1, "99,1")
    with pytest.raises(UserError, match=r"data\.separator: '</s>' expected, but 'a' was written with '<s>'"):
        PackedSamples([a], 8, 1, "99,1", separator="</s>")
    with pytest.raises(UserError, match="'none' was written with None"):
        PackedSamples([none], 8, 1, "99,1", separator="<s>")
    PackedSamples([a, none], 8, 1, "99,1")


def test_bad_mixtures_are_told(tmp_path: Path) -> None:
    path = dataset(tmp_path / "a", [5] * 20)
    empty = dataset(tmp_path / "empty", [0] * 20)
    for mixture, told in [
        ([], "empty"),
        ([entry(path, 0)], "must be above 0"),
        ([entry(path, float("nan"))], "must be above 0"),
        ([entry(path), entry(path)], "occurs twice"),
        ([entry(empty)], "has a token"),
        ([entry(tmp_path / "absent")], "does not exist"),
    ]:
        with pytest.raises(UserError, match=told):
            PackedSamples(mixture, 8, 1, "99,1")


def test_a_dataset_of_megatron_without_sidecar_is_sampled(tmp_path: Path) -> None:
    path = dataset(tmp_path / "a", [5] * 20)
    assert IndexedDataset(path).sidecar is None
    assert PackedSamples([entry(path)], 8, 1, "99,1").row(0).tokens[:].shape == (9,)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=10))
def test_any_window_holds_every_domain_in_its_share(weights: list[float]) -> None:
    blend = Blend(weights)
    counts = np.array([blend.counts(k) for k in range(0, 2001, 10)])
    ahead = counts - np.outer(np.arange(0, 2001, 10), blend.shares)
    assert np.abs(ahead).max() <= len(weights) / 2 + 1
    assert np.ptp(ahead, axis=0).max() <= len(weights) / 2 + 1


@pytest.mark.slow
def test_a_million_samples_are_within_a_ten_thousandth_of_the_weights() -> None:
    shares = np.array(WEIGHTS[3]) / sum(WEIGHTS[3])
    np.testing.assert_allclose(Blend(WEIGHTS[3]).counts(1_000_000) / 1e6, shares, rtol=0, atol=1e-5)
