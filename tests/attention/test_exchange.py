"""Every exchange on 1, 2 and 4 ranks against dense float64 attention of the whole sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.exchange import heads_can_be_shared
from tests.attention import workers
from tests.attention.reference import TOLERANCE, assert_near, dense, whole
from tests.attention.workers import Setting
from tests.pool import WorkerPool

WORKERS = "tests.attention.workers"


@st.composite
def drawn_settings(draw: st.DrawFn, multiple: int) -> Setting:
    """Documents of any length down to 1, rows alike or not, windows shorter and longer than documents."""
    length = multiple * draw(st.integers(1, 24))
    row = st.sets(st.integers(1, max(1, length - 1)), max_size=8).map(lambda cuts: (0, *sorted(cuts - {length})))
    rows = draw(st.lists(row, min_size=1, max_size=3))
    return Setting(
        seed=draw(st.integers(0, 2**20)),
        length=length,
        groups=draw(st.sampled_from([1, 2, 3, 4])),
        group_size=draw(st.sampled_from([1, 2, 4])),
        head_dim=2 * draw(st.integers(1, 16)),
        starts=tuple(rows) if draw(st.booleans()) else (rows[0],) * len(rows),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        window=draw(st.none() | st.integers(1, length)),
        kind=draw(st.sampled_from(["zigzag", "per_document_zigzag", "balanced"])),
    )


@settings(max_examples=60, deadline=None)
@given(setting=drawn_settings(1))
def test_alone(setting: Setting) -> None:
    ours = workers.attend(setting.case(), setting.plan(1), window=setting.window)
    assert_near(ours, dense(setting.case(), setting.rows, setting.window), setting.dtype)


@pytest.mark.parametrize("ranks", [2, 4])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_over_ranks(pool: WorkerPool, ranks: int, data: st.DataObject) -> None:
    setting = data.draw(drawn_settings(2 * ranks))
    heads = setting.groups * setting.group_size
    exchanges = ["ring", "all_gather"]
    exchanges += ["ulysses"] if heads_can_be_shared(heads, setting.groups, ranks) else []
    exchanges += ["ring_2", "all_gather_2"] if ranks == 4 and heads_can_be_shared(heads, setting.groups, 2) else []
    by_rank = pool.run(ranks, f"{WORKERS}:shares", setting, exchanges)
    truth, plan = dense(setting.case(), setting.rows, setting.window), setting.plan(ranks)
    for index, exchange in enumerate(exchanges):
        pieces = zip(*(by_rank[rank][index] for rank in range(ranks)), strict=True)
        ours = [whole(piece, plan) for piece in pieces]
        assert all(t.dtype == setting.dtype for t in ours), exchange
        assert_near(ours, truth, setting.dtype)


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_rounds_are_bit_equal_while_ranks_drift(pool: WorkerPool, ranks: int) -> None:
    """With two ranks the next one is the one before: messages of several steps must still find their own."""
    assert pool.run(ranks, f"{WORKERS}:repeat", 40, 8 * ranks) == [True] * ranks


def test_groups_beside_each_other(pool: WorkerPool) -> None:
    results = pool.run(4, f"{WORKERS}:in_two_subgroups")
    for which in (0, 1):
        setting = Setting(40 + which, 32, 2, 2, 8, ((0,),))
        pieces = zip(results[which], results[which + 2], strict=True)
        assert_near([whole(piece, setting.plan(2)) for piece in pieces], dense(setting.case()), torch.float32)


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "ulysses"])
def test_one_attention_after_another(pool: WorkerPool, exchange: str) -> None:
    alone = pool.run(1, f"{WORKERS}:two_layers_at_once", exchange)[0]
    for ranks in (2, 4):
        plan = Setting(60, 48, 4, 1, 8, ((0, 20), (0,))).plan(ranks)
        pieces = zip(*pool.run(ranks, f"{WORKERS}:two_layers_at_once", exchange), strict=True)
        for mine, other in zip([whole(piece, plan) for piece in pieces], alone, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_a_gradient_without_layout_and_inputs_that_are_views() -> None:
    """`sum().backward()` hands down an expanded scalar; Megatron's q, k, v are slices of one projection."""
    setting = Setting(3, 24, 2, 2, 8, ((0,), (0,)))
    case = setting.case()
    projection = torch.cat((case.q, case.k, case.v), dim=2).requires_grad_()
    q, k, v = projection.split([4, 2, 2], dim=2)
    out = workers.context_attention(q, k, v, setting.plan(1), workers.ALONE, workers.CPU, case.scale)
    out.sum().backward()
    case.grad = torch.ones_like(case.q)
    assert projection.grad is not None
    assert_near([case.q, *projection.grad.split([4, 2, 2], dim=2)], [case.q.double(), *dense(case)[1:]], torch.float32)
