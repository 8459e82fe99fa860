"""Frequencies bit for bit as transformers computes them, and the published numbers of YaRN."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalong.config.rope import RopeSettings
from megalong.errors import UserError
from megalong.rope import inverse_frequencies, temperature
from megalong.rope.frequencies import correction_range

HEAD_DIMS = st.integers(4, 128).map(lambda half: 2 * half)
FACTORS = st.floats(1, 1000)
COMMON: dict[str, Any] = {
    "rope_theta": st.floats(1e3, 1e9),
    "original_max_position_embeddings": st.integers(64, 1 << 20),
    "factor": FACTORS,
}
YARN = st.builds(
    RopeSettings,
    type=st.just("yarn"),
    beta_fast=st.floats(2, 64),
    beta_slow=st.floats(0.1, 1.9),
    truncate=st.booleans(),
    attention_factor=st.none() | st.floats(0.5, 3),
    mscale=st.none() | st.floats(0, 2),
    mscale_all_dim=st.none() | st.floats(0, 2),
    **COMMON,
)
LLAMA3 = st.builds(
    RopeSettings,
    type=st.just("llama3"),
    low_freq_factor=st.floats(0.5, 2),
    high_freq_factor=st.floats(2.1, 32),
    **COMMON,
)
LINEAR = st.builds(RopeSettings, type=st.just("linear"), factor=FACTORS, rope_theta=COMMON["rope_theta"])
NONE = st.builds(RopeSettings, rope_theta=COMMON["rope_theta"])


def transformers_says(rope: RopeSettings, head_dim: int) -> tuple[torch.Tensor, float]:
    """Hand `rope`'s own fields to transformers, not through our export, which has its own tests."""
    parameters = {key: value for key, value in rope.model_dump().items() if value is not None and key != "type"}
    parameters["rope_type"] = "default" if rope.type == "none" else rope.type
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters)
    if rope.type == "none":
        frequencies, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.type](config)
    return frequencies, scaling


@settings(max_examples=400, deadline=None)
@given(rope=YARN | LLAMA3 | LINEAR | NONE, head_dim=HEAD_DIMS)
def test_bit_equal_to_transformers(rope: RopeSettings, head_dim: int) -> None:
    expected, scaling = transformers_says(rope, head_dim)
    ours = inverse_frequencies(rope, head_dim)
    assert ours.dtype == torch.float32
    assert ours.shape == (head_dim // 2,)
    assert torch.equal(ours, expected)
    assert temperature(rope) == scaling


def ultralong(factor: float, **other: Any) -> RopeSettings:
    return RopeSettings(
        type="yarn",
        rope_theta=5e5,
        factor=factor,
        beta_fast=4,
        beta_slow=1,
        original_max_position_embeddings=8192,
        **other,
    )


def test_ultralong_ramp_and_temperatures() -> None:
    assert correction_range(ultralong(128), 128) == (28, 35)
    low, high = correction_range(ultralong(128, truncate=False), 128)
    assert 28 < low < 29
    assert 34 < high < 35
    for factor, value in ((128, 1.4852), (256, 1.5545), (512, 1.6238)):
        assert temperature(ultralong(factor)) == pytest.approx(value, abs=5e-5)
    for factor, value in ((128, 2.206), (256, 2.417), (512, 2.637)):
        assert temperature(ultralong(factor)) ** 2 == pytest.approx(value, abs=5e-4)


def test_ultralong_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain = inverse_frequencies(RopeSettings(rope_theta=5e5), 128)
    scaled = inverse_frequencies(ultralong(128), 128)
    assert torch.equal(scaled[:29], plain[:29])
    torch.testing.assert_close(scaled[35:], plain[35:] / 128)
    assert ((scaled[29:35] < plain[29:35]) & (scaled[29:35] > plain[29:35] / 128)).all()


def test_llama3_is_the_papers_ramp_and_differs_from_yarns_in_six_pairs() -> None:
    """Paper (2309.00071, eq. 18-20): a ramp in rotations between alpha=1 and beta=4; 6 pairs differ, up to 0.89."""
    llama3 = RopeSettings(
        type="llama3", rope_theta=5e5, factor=512, original_max_position_embeddings=8192, high_freq_factor=4
    )
    plain = inverse_frequencies(RopeSettings(rope_theta=5e5), 128).double()
    rotations = 8192 * plain / (2 * torch.pi)
    ramp = ((rotations - 1) / (4 - 1)).clamp(0, 1)
    paper = (1 - ramp) * plain / 512 + ramp * plain
    ours = inverse_frequencies(llama3, 128).double()
    torch.testing.assert_close(ours, paper, rtol=1e-5, atol=0)
    relative = (inverse_frequencies(ultralong(512), 128).double() - ours).abs() / ours
    assert (relative > 1e-4).sum() == 6
    assert relative.max().item() == pytest.approx(0.89, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(theta=COMMON["rope_theta"], factor=FACTORS, head_dim=HEAD_DIMS)
def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest(theta: float, factor: float, head_dim: int) -> None:
    plain = inverse_frequencies(RopeSettings(rope_theta=theta), head_dim)
    scaled = inverse_frequencies(RopeSettings(type="ntk", rope_theta=theta, factor=factor), head_dim)
    assert scaled[0] == plain[0] == 1
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / factor, rel=1e-5)


def test_temperature_is_for_yarn_alone() -> None:
    for kind in ("linear", "ntk", "llama3"):
        assert temperature(RopeSettings(type=kind, factor=128.0, rope_theta=5e5)) == 1.0


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeSettings(), "rope_theta"),
        (RopeSettings(type="yarn", factor=4, rope_theta=1e4), "original_max_position_embeddings"),
        (RopeSettings(type="llama3", factor=4, rope_theta=1e4), "original_max_position_embeddings"),
    ],
)
def test_missing_values_are_named(rope: RopeSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inverse_frequencies(rope, 64)


@given(head_dim=st.sampled_from([64, 128]), factor=st.floats(2, 1000), length=st.sampled_from([2048, 8192]))
def test_yarn_over_rotations_is_the_papers_formula_and_keeps_its_temperature(
    head_dim: int, factor: float, length: int
) -> None:
    """Equations 17 to 20 of arXiv 2309.00071: r(d) = L / wavelength, gamma its ramp from beta_slow to beta_fast."""
    rope = RopeSettings(
        type="yarn", rope_theta=5e5, factor=factor, original_max_position_embeddings=length, beta_fast=32, beta_slow=1,
        ramp="rotations",
    )  # fmt: skip
    theta = 5e5 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    gamma = ((length * theta / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    paper = (1 - gamma) * theta / factor + gamma * theta
    torch.testing.assert_close(inverse_frequencies(rope, head_dim).double(), paper, rtol=1e-5, atol=0)
    assert temperature(rope) == 0.1 * math.log(factor) + 1
