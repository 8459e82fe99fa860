"""A scaling's temperature and changed base: numbers that follow from the settings alone, without torch."""

import math

from megalong.config.rope import RopeSettings
from megalong.errors import UserError


def temperature(rope: RopeSettings) -> float:
    """Factor on queries and on keys (attention scores get its square); 1.0 for all types but yarn.

    An explicit `attention_factor` takes precedence, then the ratio of the mscale pair (DeepSeek's refinement), then the
    paper's `0.1 ln(factor) + 1` (arXiv 2309.00071, equation 22).
    """
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _logarithmic(rope.factor, rope.mscale) / _logarithmic(rope.factor, rope.mscale_all_dim)
    return _logarithmic(rope.factor, 1.0)


def ntk_theta(rope: RopeSettings, head_dim: int) -> float:
    """The base that NTK-aware scaling changes to: `theta * factor^(d / (d - 2))`."""
    if head_dim <= 2:
        raise UserError(f"rope.type: ntk needs a head dimension above 2, not {head_dim}; write type: linear")
    return theta_of(rope) * math.pow(rope.factor, head_dim / (head_dim - 2))


def theta_of(rope: RopeSettings) -> float:
    """The base; UserError if neither the configuration nor a checkpoint has one."""
    if rope.rope_theta is None:
        raise UserError("rope.rope_theta: is empty and no checkpoint filled it in; write the base, e.g. 500000.0")
    return rope.rope_theta


def _logarithmic(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
