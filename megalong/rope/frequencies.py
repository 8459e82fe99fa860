"""The rotation frequency of each pair of channels, for every type of RoPE scaling.

Unscaled, pair i of a head of d channels rotates by `theta^(-2i/d)` radians per token. To extend a model trained on L
tokens by the factor s:

    linear   every frequency / s
    ntk      theta -> theta * s^(d/(d-2)): pair 0 keeps its frequency, the last one is divided by exactly s
    yarn     pairs with many turns within L keep their frequency (they distinguish neighbours), pairs without a full
             turn are divided by s, with a ramp between, linear in the pair's index (`ramp: dimensions`, YaRN's code)
             or in the number of turns within L (`ramp: rotations`, the paper's text)
    llama3   the latter, without yarn's temperature

Worked example, UltraLong at 1M: theta 5e5, d 128, L 8192, s 128, beta_fast 4, beta_slow 1. A pair makes r turns within
L at index `d ln(L / 2 pi r) / (2 ln theta)`: 4 turns at 28.2, one turn at 35.0 (34.96), so pairs 0..28 are kept and
pairs 35..63 divided by 128.

YaRN also multiplies queries and keys by a temperature, here 0.1 ln 128 + 1 = 1.485, because attention over more tokens
is flatter. We never scale cos and sin; the caller multiplies the softmax scale by the temperature's square.

The arithmetic follows transformers' order of float32 operations, so the frequencies are bit-equal to those that the
exported model uses there. A float64 result would be closer to the formula but further from the served model.

Sources: linear arXiv 2306.15595; ntk and yarn arXiv 2309.00071, sections 3.1 to 3.4; llama3: Llama 3.1's release.
"""

import math
from collections.abc import Callable

import torch

from megalong.config.rope import RopeSettings
from megalong.errors import UserError
from megalong.rope.scaling import ntk_theta, theta_of


def inverse_frequencies(rope: RopeSettings, head_dim: int) -> torch.Tensor:
    """Radians per token of each pair: float32 `[head_dim / 2]`, on the CPU.

    Raises `UserError` if a value is missing that only the checkpoint could provide.
    """
    return SCALINGS[rope.type](rope, head_dim)


def correction_range(rope: RopeSettings, head_dim: int) -> tuple[float, float]:
    """(low, high): yarn keeps pairs up to index `low`, divides those from `high` on, and ramps between.

    (28, 35) in the example above. With `truncate` both are rounded outwards to whole indices, as in YaRN's own code.
    """
    theta, original = theta_of(rope), _original(rope)

    def index_with(turns: float) -> float:
        return (head_dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = index_with(rope.beta_fast), index_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _unscaled(theta: float, head_dim: int) -> torch.Tensor:
    return 1.0 / _powers(theta, head_dim)


def _powers(theta: float, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return torch.pow(theta, exponents)


def _yarn(rope: RopeSettings, head_dim: int) -> torch.Tensor:
    if rope.ramp == "rotations":
        return _by_rotations(rope, head_dim, rope.beta_slow, rope.beta_fast)
    low, high = correction_range(rope, head_dim)
    if low == high:
        high += 0.001  # a step instead of a ramp; transformers' width
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((index - low) / (high - low)).clamp(0, 1)
    powers = _powers(theta_of(rope), head_dim)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _by_rotations(rope: RopeSettings, head_dim: int, slow: float, fast: float) -> torch.Tensor:
    """Divide pairs below `slow` turns within the original length by the factor, keep those above `fast`."""
    original = _original(rope)
    unscaled = _unscaled(theta_of(rope), head_dim)
    wavelength = 2 * math.pi / unscaled
    long = wavelength > original / slow
    short = wavelength < original / fast
    kept = (original / wavelength - slow) / (fast - slow)
    ramp = (1 - kept) * unscaled / rope.factor + kept * unscaled
    return torch.where(short, unscaled, torch.where(long, unscaled / rope.factor, ramp))


def _original(rope: RopeSettings) -> int:
    if rope.original_max_position_embeddings is None:
        raise UserError(
            f"rope.original_max_position_embeddings: is empty, but type {rope.type} depends on it; "
            "write the longest sequence trained before scaling, e.g. 8192"
        )
    return rope.original_max_position_embeddings


SCALINGS: dict[str, Callable[[RopeSettings, int], torch.Tensor]] = {
    "none": lambda rope, head_dim: _unscaled(theta_of(rope), head_dim),
    "linear": lambda rope, head_dim: _unscaled(theta_of(rope), head_dim) / rope.factor,
    "ntk": lambda rope, head_dim: _unscaled(ntk_theta(rope, head_dim), head_dim),
    "yarn": _yarn,
    "llama3": lambda rope, head_dim: _by_rotations(rope, head_dim, rope.low_freq_factor, rope.high_freq_factor),
}
