"""How positions are scaled: the settings of rotary embeddings, without their mathematics (that is `megalong/rope`).

A model trained on `original_max_position_embeddings` positions is extended to `factor` times as many. The type decides
how the rotation frequencies change:

    none     unchanged; with another `rope_theta` this is the base change of ABF
    linear   every frequency divided by factor (position interpolation)
    ntk      base * factor^(d / (d - 2)): slow pairs interpolated, fast ones nearly untouched
    yarn     fast pairs kept, slow pairs divided by factor, a ramp between beta_fast and beta_slow rotations, and a
             temperature of 0.1 ln(factor) + 1 on queries and keys (attention_factor, or the mscale pair, replace it);
             `ramp: dimensions` is linear in the pair's index as in YaRN's code and transformers, `ramp: rotations` in
             the number of rotations as in the paper's text
    llama3   as yarn with its ramp between low_freq_factor and high_freq_factor rotations, without temperature

Sources: position interpolation arXiv 2306.15595, YaRN arXiv 2309.00071, ABF arXiv 2309.16039; llama3 as in
transformers' `modeling_rope_utils.py`. Keys have the names of transformers' `rope_parameters`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megalong.config.section import Section

RopeType = Literal["none", "linear", "ntk", "yarn", "llama3"]


def whole(value: Any) -> Any:
    """8192.0 as 8192, because some writers of `config.json` write either. Other values are left to validation."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Length = Annotated[int, BeforeValidator(whole), Field(ge=1)]


class RopeSettings(Section):
    """RoPE scaling; `None` for theta or the original length means the checkpoint's value."""

    type: RopeType = "none"
    """Kind of scaling; see [RoPE scaling](attention.md)."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Rotary base; default: the model's. Example: `500000.0`"""
    factor: float = Field(default=1.0, ge=1)
    """How many times longer than the original length."""
    original_max_position_embeddings: Length | None = None
    """Positions before scaling; default: the model's. Example: `8192`"""
    beta_fast: float = Field(default=32.0, gt=0)
    """YaRN: pairs with more rotations over the original length keep their frequency."""
    beta_slow: float = Field(default=1.0, gt=0)
    """YaRN: pairs with fewer rotations are divided by `factor`."""
    attention_factor: float | None = Field(default=None, gt=0)
    """YaRN: temperature on queries and keys; default 0.1 ln(factor) + 1. Example: `1.2`"""
    mscale: float | None = Field(default=None, ge=0)
    """YaRN: numerator of the temperature as DeepSeek writes it. Example: `1.0`"""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    """YaRN: its denominator. Example: `1.0`"""
    truncate: bool = True
    """YaRN: round the ramp's bounds to whole pairs, as YaRN's code does."""
    ramp: Literal["dimensions", "rotations"] = "dimensions"
    """YaRN: ramp linear in the pair's index (`dimensions`, as in the code) or in rotations (as in the paper)."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: pairs with fewer rotations are divided by `factor`."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: pairs with more rotations keep their frequency."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.type == "none" and self.factor != 1:
            raise ValueError(f"factor {self.factor:g} has no effect with type none; write type: yarn, or drop factor")
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast {self.beta_fast:g} must be above beta_slow {self.beta_slow:g} "
                "(rotations over the original length: the ramp runs from beta_slow up to beta_fast)"
            )
        if self.ramp == "rotations" and self.type != "yarn":
            raise ValueError(
                f"ramp rotations with type {self.type}: only yarn has a choice; write type: yarn, or drop it"
            )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor {self.low_freq_factor:g}"
            )
        return self
