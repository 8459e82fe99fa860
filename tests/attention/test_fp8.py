"""Rounding to 8 bits against the numbers the formats have, and FP8 attention against float64 within their bounds."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.exchange import ContextGroups, context_attention
from megalong.attention.fp8 import (
    FORMATS,
    AttentionRounding,
    fp8_kernel,
    largest_magnitude,
    rounded,
    rounded_in_any_tile,
    rounded_probabilities,
    rounded_rows,
    scale_for,
    to_fp8,
)
from megalong.attention.layout import TokenLayout
from megalong.attention.plan import make_plan
from tests.attention.reference import Case, dense, random_case
from tests.pool import WorkerPool

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Half a step, relative to a normal number, and half of the smallest number, both before scaling.
HALF_STEP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
HALF_SMALLEST = {E4M3: 2.0**-10, E5M2: 2.0**-17}
DTYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def error_bound(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far each number may be off after a round trip with a scale from the largest."""
    amax = tensor.double().abs().max()
    bound = HALF_STEP[dtype] * tensor.double().abs() + HALF_SMALLEST[dtype] * amax / torch.finfo(dtype).max
    return bound * (1 + 1e-5)  # the scale itself is a float32


@DTYPES
def test_it_is_the_nearest_of_the_formats_numbers(dtype: torch.dtype) -> None:
    """All 256 bit patterns, decoded by hand, and what lies between and beyond them."""
    mantissa_bits, bias = (3, 7) if dtype is E4M3 else (2, 15)
    numbers = set()
    for bits in range(128):
        exponent, mantissa = bits >> mantissa_bits, bits & (2**mantissa_bits - 1)
        special = bits == 127 if dtype is E4M3 else exponent == 31
        if not special:
            fraction = mantissa / 2**mantissa_bits
            numbers.add(math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias))
    table = torch.tensor(sorted(numbers), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    values = torch.exp2(torch.rand(20_000, generator=generator) * 40 - 22)
    one = torch.ones(())
    ours = to_fp8(values, one, dtype).double()
    nearest = (values.double() - ours).abs()
    truth = (values.double()[:, None] - table).abs().min(-1).values
    assert torch.equal(nearest, truth)
    assert torch.equal(to_fp8(-values, one, dtype).double(), -ours)
    huge = torch.tensor([1e9, float("inf")])
    assert to_fp8(huge, one, dtype).tolist() == [table[-1]] * 2


@DTYPES
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 300), exponent=st.integers(-100, 100), spread=st.integers(0, 30))
def test_a_round_trip_stays_within_half_a_step(
    dtype: torch.dtype, seed: int, size: int, exponent: int, spread: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(size, generator=generator) * spread
    tensor = torch.ldexp(torch.randn(size, generator=generator) * torch.exp2(powers), torch.tensor(exponent))
    result = rounded(tensor, dtype, largest_magnitude(tensor))
    assert ((result.double() - tensor.double()).abs() <= error_bound(tensor, dtype)).all()


@DTYPES
def test_scales_of_odd_tensors(dtype: torch.dtype) -> None:
    assert scale_for(torch.tensor(2.0), dtype) == torch.finfo(dtype).max / 2
    for amax in (0.0, float("inf"), float("nan")):
        assert scale_for(torch.tensor(amax), dtype, 3.0) == 3.0
    assert scale_for(torch.tensor(1e-44), dtype) == torch.finfo(torch.float32).max
    assert largest_magnitude(torch.tensor([1.0, -5.0]), torch.tensor([4.0])) == 5


def test_softmax_weights_keep_their_bound_far_below_one() -> None:
    """Rows of a long softmax: relative to the row's largest nothing is lost, relative to 1 all below 2^-10 / 448."""
    weights = torch.rand(64, 1000, generator=torch.Generator().manual_seed(1)) * 1e-7
    by_row = rounded_rows(weights, E4M3)
    row_bound = HALF_STEP[E4M3] * weights + HALF_SMALLEST[E4M3] * weights.amax(-1, keepdim=True) / 448
    assert ((by_row - weights).abs() <= row_bound * (1 + 1e-5)).all()
    assert not rounded_probabilities(weights, E4M3).any()
    assert torch.equal(rounded_rows(torch.zeros(2, 3), E4M3), torch.zeros(2, 3))
    probabilities = torch.tensor([1.0, 0.5, 0.3, 2e-3])
    torch.testing.assert_close(rounded_probabilities(probabilities, E4M3), probabilities, rtol=2**-4, atol=0)


@DTYPES
def test_tiles_round_alike_whatever_their_largest_number(dtype: torch.dtype) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole = rounded_in_any_tile(tensor, dtype)
    tiles = torch.cat([rounded_in_any_tile(tile, dtype) for tile in tensor.split(37)])
    # But for what is too small for the whole tensor's scale, and not for its tile's.
    small = tensor.abs() < tensor.abs().max() * 2.0**-13
    assert torch.equal(whole[~small], tiles[~small])
    assert ((whole - tensor).abs() <= HALF_STEP[dtype] * tensor.abs() + 2.0**-18 * tensor.abs().max()).all()


SHAPES = {
    "seed": st.integers(0, 2**31),
    "length": st.integers(1, 100),
    "batch": st.integers(1, 2),
    "groups": st.integers(1, 2),
    "group_size": st.integers(1, 4),
    "head_dim": st.integers(2, 32).map(lambda half: 2 * half),
}


def soft_case(scale: float, **shape: int) -> Case:
    """A case with scores of a quarter: where they are large, a bound on their rounding says nothing about softmax."""
    case = random_case(dtype=torch.float32, **shape)
    return Case(scale * case.q, scale * case.k, scale * case.v, case.grad, case.scale / 8 / scale**2)


def emulated(case: Case, name: str, results: bool) -> list[torch.Tensor]:
    """[out, grad_q, grad_k, grad_v] with FP8 operands."""
    formats = FORMATS[name]
    kernel, plan = fp8_kernel(formats), make_plan(TokenLayout(), case.q.shape[0])
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    out = AttentionRounding(formats, results).around(
        lambda q, k, v: context_attention(q, k, v, plan, ContextGroups(), kernel, case.scale), *leaves
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]


def bound_of_attention(case: Case, results: bool) -> torch.Tensor:
    """How far each number of O may be off, from half a step of e4m3 for each of Q, K, P, V (and O).

    Scores are off by at most D = scale * (dQ |K| + |Q| dK + dQ dK), so weights by a factor within exp(+-2 max D) of
    each row, and rounding moves them by half a step more; then sums of |P| and |V| bound the result.
    """
    q, k, v = (t.double() for t in (case.q, case.k, case.v))
    group_size = q.shape[2] // k.shape[2]
    step, least = HALF_STEP[E4M3], HALF_SMALLEST[E4M3] / 448
    floor = least * max(float(t.abs().max()) for t in (q, k, v))
    errors = [step * t.abs() + floor for t in (q, k, v)]
    k, v, dk, dv = (t.repeat_interleave(group_size, dim=2) for t in (k, v, *errors[1:]))
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()

    def pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ibhd,jbhd->bhij", a, b) * case.scale

    off = pairs(errors[0], k.abs()) + pairs(q.abs(), dk) + pairs(errors[0], dk)
    factor = (2 * off.masked_fill(~seen, 0.0).amax(-1, keepdim=True)).exp()
    weights = pairs(q, k).masked_fill(~seen, -math.inf).softmax(-1)
    moved = weights * factor
    weight_error = weights * (factor - 1) + step * moved + least * moved.amax(-1, keepdim=True) * seen
    bound = torch.einsum("bhij,jbhd->ibhd", moved * (1 + step) + least, dv) + torch.einsum(
        "bhij,jbhd->ibhd", weight_error, v.abs()
    )
    if results:
        out = torch.einsum("bhij,jbhd->ibhd", weights, v).abs() + bound
        bound = bound + step * out + least * out.max()
    return bound * (1 + 1e-4)


@pytest.mark.parametrize("results", [False, True], ids=["tensorwise", "delayed"])
@settings(max_examples=25, deadline=None)
@given(scale=st.integers(-20, 20).map(lambda power: 2.0**power), **SHAPES)
def test_attention_stays_within_the_bound_of_its_operands(results: bool, scale: float, **shape: int) -> None:
    case = soft_case(scale, **shape)
    ours = emulated(case, "hybrid", results)
    truth = dense(case)
    assert ((ours[0].double() - truth[0]).abs() <= bound_of_attention(case, results)).all()


# Errors of many operands add up like independent ones: each is rounded by 2^-4 / sqrt(3) of itself at most, root mean
# square, in e4m3 and twice that in e5m2. Five operands enter O (Q, K, P, V, O), nine a gradient, at most five in e5m2.
ROOT_MEAN_SQUARE = [math.sqrt(5 / 3) * 2**-4] + 3 * [math.sqrt((4 + 5 * 4) / 3) * 2**-4]


@settings(max_examples=15, deadline=None)
@given(scale=st.integers(-20, 20).map(lambda power: 2.0**power), seed=st.integers(0, 2**31))
def test_output_and_gradients_are_off_by_what_rounding_adds_up_to(scale: float, seed: int) -> None:
    case = soft_case(scale, seed=seed, length=96, batch=2, groups=2, group_size=2, head_dim=32)
    for ours, true, most in zip(emulated(case, "hybrid", True), dense(case), ROOT_MEAN_SQUARE, strict=True):
        error = float((ours.double() - true).norm() / true.norm())
        assert 2**-7 < error < most  # less than a fraction of a step would mean that nothing was rounded


def by_hand(tensor: torch.Tensor, dtype: torch.dtype, amax: torch.Tensor | float) -> torch.Tensor:
    """Rounded with the scale of `amax`, in float64."""
    limit = torch.finfo(dtype).max
    unit = torch.as_tensor(amax, dtype=torch.float64) / limit
    return (tensor / unit).clamp(-limit, limit).to(dtype).double() * unit


def attention_by_hand(case: Case) -> list[torch.Tensor]:
    """[out, grad_q, grad_k, grad_v] of one head under tensorwise `hybrid`, formula by formula."""
    amax = max(float(t.abs().max()) for t in (case.q, case.k, case.v))
    q, k, v = (by_hand(t[:, 0, 0].double(), E4M3, amax) for t in (case.q, case.k, case.v))
    grad = case.grad[:, 0, 0].double()
    grad = by_hand(grad, E5M2, float(grad.abs().max()))
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    weights = (q @ k.t() * case.scale).masked_fill(~seen, -math.inf).softmax(-1)
    out = by_hand(weights, E4M3, weights.amax(-1, keepdim=True)) @ v
    grad_v = by_hand(weights, E4M3, 1.0).t() @ grad
    scores = weights * (grad @ v.t() - (grad * out).sum(-1, keepdim=True))
    power = 2.0 ** math.floor(math.log2(57344 / float(scores.abs().max())))
    scores = by_hand(scores, E5M2, 57344 / power) * case.scale
    return [t[:, None, None] for t in (out, scores @ k, scores.t() @ q, grad_v)]


@pytest.mark.parametrize("seed", range(3))
def test_every_operand_is_rounded_and_nothing_else(seed: int) -> None:
    """To a tenth of the least of these roundings; float32 and float64 round some numbers to different sides."""
    case = soft_case(0.7, seed=seed, length=80, batch=1, groups=1, group_size=1, head_dim=32)
    for ours, true in zip(emulated(case, "hybrid", False), attention_by_hand(case), strict=True):
        assert float((ours.double() - true).norm() / true.norm()) < 1e-3


def test_a_broken_scale_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is worth something: operands that leave the range, or sink to its end, do not keep it."""
    from megalong.attention import fp8

    monkeypatch.setattr(fp8, "scale_for", lambda amax, dtype, before=1.0: torch.ones(()))
    for scale in (2.0**-10, 2.0**12):
        case = soft_case(scale, seed=4, length=50, batch=1, groups=2, group_size=2, head_dim=16)
        error = (emulated(case, "hybrid", False)[0].double() - dense(case)[0]).abs()
        assert (error > bound_of_attention(case, False)).any()


def test_documents_and_windows_are_masked_as_ever() -> None:
    """Rounded attention sees the same keys: values of one give one, and nothing of another document shows."""
    starts = [np.array([0, 1, 17]), np.array([0, 40])]
    plan = make_plan(TokenLayout(), 64, starts)
    case = random_case(5, 64, 2, 2, 2, 16, torch.float32)
    hidden = case.v.clone()
    hidden[:17, 0] = float("nan")  # a document that the last one must not see
    kernel = fp8_kernel(FORMATS["hybrid"])
    result = context_attention(case.q, case.k, torch.ones_like(case.v), plan, ContextGroups(), kernel, case.scale, 9)
    torch.testing.assert_close(result, torch.ones_like(result), rtol=2**-4, atol=0)
    blind = context_attention(case.q, case.k, hidden, plan, ContextGroups(), kernel, case.scale, 9)
    assert blind[17:, 0].isfinite().all()


def rounded_together(magnitudes: list[float]) -> list[torch.Tensor]:
    """On each rank: two tensors as large as its entry of `magnitudes`, rounded with the scale of the group."""
    numbers = torch.linspace(-1, 1, 41) * magnitudes[dist.get_rank()]
    rounding = AttentionRounding(FORMATS["hybrid"], True, dist.group.WORLD)
    return list(rounding.together((numbers, 3 * numbers), E4M3))


def test_ranks_share_one_scale(pool: WorkerPool) -> None:
    magnitudes = [0.37, 5.1]
    for rank, ours in enumerate(pool.run(2, "tests.attention.test_fp8:rounded_together", magnitudes)):
        numbers = torch.linspace(-1, 1, 41) * magnitudes[rank]
        amax = 3 * torch.tensor(magnitudes[1])
        for mine, tensor in zip(ours, (numbers, 3 * numbers), strict=True):
            assert torch.equal(mine, rounded(tensor, E4M3, amax))
