"""Every token lies on one rank, every visible pair of tokens in one block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalong.attention.layout import ZigzagLayout
from megalong.errors import UserError

SIZES = st.integers(1, 8)


def test_the_example_of_the_module() -> None:
    layout = ZigzagLayout(2)
    assert layout.indices(16, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert layout.indices(16, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert ZigzagLayout(1).indices(5, 0).tolist() == [0, 1, 2, 3, 4]


@given(size=SIZES, chunk=st.integers(1, 5))
def test_blocks_cover_the_causal_mask_exactly_and_equally(size: int, chunk: int) -> None:
    """Mark what each block computes in an S x S table: it must be the lower triangle, each pair once."""
    layout, length = ZigzagLayout(size), 2 * chunk
    total = length * size
    seen = torch.zeros(total, total, dtype=torch.int64)
    for rank in range(size):
        for source in range(size):
            block = layout.visible(length, rank, source)
            rows = layout.indices(total, rank)[block.queries]
            columns = layout.indices(total, source)[block.keys]
            pairs = torch.ones(len(rows), len(columns), dtype=torch.int64)
            seen[rows[:, None], columns] += pairs.tril() if block.causal else pairs
            assert source == rank or pairs.numel() == length * length // 2
    assert torch.equal(seen, torch.ones(total, total, dtype=torch.int64).tril())


@given(size=SIZES, chunk=st.integers(1, 5), dim=st.integers(0, 1))
def test_gather_is_the_inverse_of_sharding(size: int, chunk: int, dim: int) -> None:
    layout, total = ZigzagLayout(size), 2 * size * chunk
    whole = torch.randn(total, total)
    pieces = [whole.index_select(dim, layout.indices(total, rank)) for rank in range(size)]
    assert torch.equal(layout.gather(pieces, dim), whole)


@pytest.mark.parametrize(("size", "length", "advice"), [(2, 10, 8), (4, 15, 16), (4, 1, 8), (8, 1000, 992)])
def test_a_length_that_does_not_divide_is_refused_with_the_nearest_that_does(
    size: int, length: int, advice: int
) -> None:
    with pytest.raises(UserError, match=f"data.seq_length: {length} .* write {advice}"):
        ZigzagLayout(size).check(length)
    ZigzagLayout(size).check(advice)
    ZigzagLayout(1).check(length)
