"""Ring attention on 1, 2 and 4 ranks against dense float64 attention of the whole sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.layout import ZigzagLayout
from tests.attention import workers
from tests.attention.reference import TOLERANCE, assert_near, dense, random_case
from tests.pool import WorkerPool

WORKERS = "tests.attention.workers"
SHAPES: list[workers.Shape] = [
    # tokens a chunk, batch, groups, group size, head dimension
    (16, 1, 2, 1, 8),
    (1, 2, 1, 4, 16),
    (33, 1, 1, 1, 20),
    (20, 3, 2, 4, 32),
    (75, 2, 1, 8, 64),
    (128, 1, 2, 2, 16),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_result_and_gradients_over_ranks(pool: WorkerPool, ranks: int, dtype: torch.dtype) -> None:
    cases = [(seed, shape, dtype) for seed, shape in enumerate(SHAPES)]
    by_rank = pool.run(ranks, f"{WORKERS}:shares", cases)
    for index, (seed, (chunk, batch, groups, group_size, head_dim), _) in enumerate(cases):
        pieces = zip(*(by_rank[rank][index] for rank in range(ranks)), strict=True)
        ours = [ZigzagLayout(ranks).gather(piece) for piece in pieces]
        assert all(t.dtype == dtype for t in ours)
        whole = random_case(seed, 2 * ranks * chunk, batch, groups, group_size, head_dim, dtype)
        assert_near(ours, dense(whole), dtype)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 130),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 4),
    head_dim=st.integers(1, 32),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_alone_it_is_plain_causal_attention(
    length: int, batch: int, groups: int, group_size: int, head_dim: int, seed: int, dtype: torch.dtype
) -> None:
    case = random_case(seed, length, batch, groups, group_size, head_dim, dtype)
    assert_near(workers.attend(case, None), dense(case), dtype)


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_rounds_are_bit_equal_while_ranks_drift(pool: WorkerPool, ranks: int) -> None:
    """With two ranks the next one is the one before: messages of several steps must still find their own."""
    assert pool.run(ranks, f"{WORKERS}:repeat", 40, 8) == [True] * ranks


def test_groups_beside_each_other(pool: WorkerPool) -> None:
    results = pool.run(4, f"{WORKERS}:in_two_subgroups")
    for which in (0, 1):
        pieces = zip(results[which], results[which + 2], strict=True)
        ours = [ZigzagLayout(2).gather(piece) for piece in pieces]
        assert_near(ours, dense(random_case(40 + which, 32, 1, 2, 2, 8, torch.float32)), torch.float32)


def test_one_attention_after_another(pool: WorkerPool) -> None:
    alone = pool.run(1, f"{WORKERS}:two_layers_at_once")[0]
    for ranks in (2, 4):
        pieces = zip(*pool.run(ranks, f"{WORKERS}:two_layers_at_once"), strict=True)
        for mine, other in zip([ZigzagLayout(ranks).gather(piece) for piece in pieces], alone, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_a_gradient_without_layout_and_inputs_that_are_views() -> None:
    """`sum().backward()` hands down an expanded scalar; Megatron's q, k, v are slices of one projection."""
    case = random_case(3, 24, 2, 2, 2, 8, torch.float32)
    projection = torch.cat((case.q, case.k, case.v), dim=2).requires_grad_()
    q, k, v = projection.split([4, 2, 2], dim=2)
    workers.ring_attention(q, k, v, case.scale).sum().backward()
    case.grad = torch.ones_like(case.q)
    assert projection.grad is not None
    assert_near([case.q, *projection.grad.split([4, 2, 2], dim=2)], [case.q.double(), *dense(case)[1:]], torch.float32)
