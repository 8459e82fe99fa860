"""Angles against float64, rotation against transformers and against autograd."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megalong.config.rope import RopeSettings
from megalong.rope import apply_rotary, cos_sin, inverse_frequencies, rotary

INV_FREQ = inverse_frequencies(RopeSettings(rope_theta=5e5), 128)
FAR = 1 << 31


def test_angles_are_exact_far_out() -> None:
    """The truth is numpy's float64 cosine of the float64 product, at random positions up to 2^31 and at the ends."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.randint(0, FAR, (2000,), generator=generator), torch.tensor([0, 1, FAR - 1, FAR])])
    cos, sin = cos_sin(INV_FREQ, positions)
    angles = np.outer(positions.numpy().astype(np.float64), INV_FREQ.numpy().astype(np.float64))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (2004, 64)
    assert np.abs(cos.numpy() - np.cos(angles)).max() < 1e-6
    assert np.abs(sin.numpy() - np.sin(angles)).max() < 1e-6


def test_the_float64_truth_itself_agrees_with_fifty_digits() -> None:
    """Reduces the exact product by 2 pi in decimal arithmetic: float64 products lose less than 1e-6 at 2^31."""
    getcontext().prec = 50
    two_pi = Decimal("6.2831853071795864769252867665590057683943387987502")
    cos, sin = cos_sin(INV_FREQ, torch.tensor([FAR - 1]))
    for pair, frequency in enumerate(INV_FREQ.tolist()):
        angle = float(Decimal(frequency) * (FAR - 1) % two_pi)
        assert cos[0, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_float32_angles_would_not_pass() -> None:
    positions = torch.arange(4 << 20, (4 << 20) + 100)
    float32 = torch.outer(positions.float(), INV_FREQ).cos()
    assert (float32 - cos_sin(INV_FREQ, positions)[0]).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 9),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    half=st.integers(1, 40),
    start=st.integers(0, 1 << 22),
)
def test_rotates_as_transformers_does(length: int, batch: int, heads: int, half: int, start: int) -> None:
    cos, sin = cos_sin(INV_FREQ[:half], torch.arange(start, start + length))
    x = torch.randn(length, batch, heads, 2 * half)
    doubled = [torch.cat((t, t), dim=-1)[None] for t in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), *doubled)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected.permute(2, 0, 1, 3), rtol=1e-6, atol=1e-6)


def test_gradient_agrees_with_finite_differences_and_autograd() -> None:
    cos, sin = (t.double() for t in cos_sin(INV_FREQ[:4], torch.arange(7, 12)))
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_rotary(t, cos, sin), x)


@pytest.mark.parametrize("tile", [1, 100, 7 * 48, 1 << 18])
def test_tiles_change_no_bit(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cos, sin = cos_sin(INV_FREQ[:8], torch.arange(20))
    x = torch.randn(20, 1, 3, 16)
    whole = apply_rotary(x, cos, sin)
    monkeypatch.setattr(rotary, "CPU_TILE_ELEMENTS", tile)
    assert torch.equal(apply_rotary(x, cos, sin), whole)


def test_bf16_is_rounded_once() -> None:
    cos, sin = cos_sin(INV_FREQ, torch.arange(1000, 1064))
    x = torch.randn(64, 2, 3, 128, dtype=torch.bfloat16, requires_grad=True)
    rotated = apply_rotary(x, cos, sin)
    exact = apply_rotary(x.detach().float(), cos, sin)
    assert torch.equal(rotated, exact.bfloat16())
    (gradient,) = torch.autograd.grad(rotated, x, torch.ones_like(rotated))
    assert gradient.dtype == torch.bfloat16


def test_accepts_views_and_keeps_no_copy_of_its_input() -> None:
    cos, sin = cos_sin(INV_FREQ[:8], torch.arange(6))
    whole = torch.randn(6, 2, 5, 32, requires_grad=True)
    view = whole[..., 16:]
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rotated = apply_rotary(view, cos, sin)
    assert torch.equal(rotated, apply_rotary(view.contiguous(), cos, sin))
    assert kept == [cos.shape, sin.shape]


def test_scores_depend_on_distance_alone() -> None:
    """The property positions are rotated for: q at 10 against k at 3 scores as q at 4M+10 against k at 4M+3."""
    q, k = torch.randn(2, 1, 1, 1, 128, dtype=torch.float64)

    def score(shift: int) -> float:
        (qc, qs), (kc, ks) = (cos_sin(INV_FREQ, torch.tensor([p + shift])) for p in (10, 3))
        return (apply_rotary(q, qc, qs) * apply_rotary(k, kc, ks)).sum().item()

    assert score(0) == pytest.approx(score(4 << 20), abs=1e-5)
