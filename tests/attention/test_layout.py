"""Every token lies on one rank, every visible pair of tokens in one block, and ranks have equal work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.layout import Kind, TokenLayout, attended_pairs, tokens_of
from megalong.attention.plan import Block, make_plan

KINDS = pytest.mark.parametrize("kind", ["zigzag", "per_document_zigzag", "balanced"])


@st.composite
def packs(draw: st.DrawFn) -> tuple[int, int, np.ndarray]:
    """(ranks, tokens, starts of documents)."""
    ranks = draw(st.integers(1, 5))
    length = 2 * ranks * draw(st.integers(1, 12))
    starts = draw(st.sets(st.integers(1, length - 1), max_size=12)) if length > 1 else set()
    return ranks, length, np.array([0, *sorted(starts)], np.int64)


def visible(length: int, starts: np.ndarray, window: int | None) -> np.ndarray:
    """The mask itself, S x S: what all blocks together must be."""
    place = np.arange(length)
    document = np.searchsorted(starts, place, side="right")
    seen = (place[:, None] >= place) & (document[:, None] == document)
    return seen if window is None else seen & (place[:, None] - place < window)


def mark(table: np.ndarray, block: Block, queries: np.ndarray, keys: np.ndarray) -> None:
    """Count the pairs of a block in an S x S table, and see that it is trimmed."""
    rows, columns = queries[block.queries], keys[block.keys]
    i, j = np.arange(len(rows))[:, None], np.arange(len(columns))
    pairs = np.ones((len(rows), len(columns)), bool)
    if block.mask.upper is not None:
        pairs &= j <= i + block.mask.upper
    if block.mask.lower is not None:
        pairs &= j >= i + block.mask.lower
    assert pairs.any(0).all()
    assert pairs.any(1).all()
    table[rows[:, None], columns] += pairs


def test_the_example_of_the_module() -> None:
    early, late = (tokens_of(runs).tolist() for runs in TokenLayout(2).runs(16, np.array([0])))
    assert early == [0, 1, 2, 3, 12, 13, 14, 15]
    assert late == [4, 5, 6, 7, 8, 9, 10, 11]


@KINDS
@settings(max_examples=60, deadline=None)
@given(pack=packs(), window=st.none() | st.integers(1, 30))
def test_every_token_on_one_rank_and_every_pair_in_one_block(
    kind: Kind, pack: tuple[int, int, np.ndarray], window: int | None
) -> None:
    ranks, length, starts = pack
    (sequence,) = make_plan(TokenLayout(ranks, kind), length, [starts]).sequences
    tokens = [tokens_of(shard.runs) for shard in sequence.shards]
    assert sorted(np.concatenate(tokens)) == list(range(length))
    assert {len(held) for held in tokens} == {length // ranks}
    from_each, from_all = np.zeros((2, length, length), np.int64)
    for rank in range(ranks):
        for source in range(ranks):
            for block in sequence.between(rank, source, window):
                mark(from_each, block, tokens[rank], tokens[source])
        for block in sequence.to_all(rank, window):
            mark(from_all, block, tokens[rank], np.arange(length))
    expected = visible(length, starts, window)
    np.testing.assert_array_equal(from_each, expected)
    np.testing.assert_array_equal(from_all, expected)


@KINDS
@settings(max_examples=30, deadline=None)
@given(pack=packs(), joined=st.sampled_from([1, 2, 3]))
def test_joined_ranks_see_the_same(kind: Kind, pack: tuple[int, int, np.ndarray], joined: int) -> None:
    _, _, starts = pack
    ranks = 2 * joined
    length = 2 * ranks * (int(starts[-1]) // (2 * ranks) + 1)
    sequence = make_plan(TokenLayout(ranks, kind), length, [starts]).sequences[0]
    together = sequence.joined(joined)
    tokens = [tokens_of(shard.runs) for shard in together.shards]
    for number, held in enumerate(tokens):
        members = slice(number * joined, (number + 1) * joined)
        laid = np.concatenate([tokens_of(shard.runs) for shard in sequence.shards[members]])
        np.testing.assert_array_equal(laid[sequence.order(members)], held)
    table = np.zeros((length, length), np.int64)
    for rank in range(2):
        for source in range(2):
            for block in together.between(rank, source, None):
                mark(table, block, tokens[rank], tokens[source])
    np.testing.assert_array_equal(table, visible(length, starts, None))


def test_causal_work_is_equal_within_one_percent() -> None:
    for ranks in (2, 8):
        whole = np.array([0])
        pairs = [attended_pairs(runs, whole) for runs in TokenLayout(ranks).runs(1 << 16, whole)]
        assert max(pairs) / min(pairs) < 1.01


@pytest.mark.parametrize("kind", ["per_document_zigzag", "balanced"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.sampled_from([300, 3000, 30000]),
    draw_length=st.sampled_from([8192, 8193, 7919, 6250]),
)
def test_work_on_random_documents_is_equal_within_ten_percent(
    kind: Kind, seed: int, mean: int, draw_length: int
) -> None:
    """Lengths as they are in corpora (log-normal), about 128K tokens on 8 ranks, whatever divides them."""
    length, ranks = 16 * draw_length, 8
    lengths = np.random.default_rng(seed).lognormal(np.log(mean), 1.2, size=10_000).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    starts = starts[starts < length]
    pairs = [attended_pairs(runs, starts) for runs in TokenLayout(ranks, kind).runs(length, starts)]
    assert max(pairs) / np.mean(pairs) < 1.10
