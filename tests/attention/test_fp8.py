"""Rounding to 8 bits against the numbers the formats have, and FP8 attention against float64 within their bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.fp8 import (
    largest_magnitude,
    rounded,
    rounded_in_any_tile,
    rounded_probabilities,
    rounded_rows,
    scale_for,
    to_fp8,
)

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
