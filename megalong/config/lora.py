"""`lora`: train small adapters beside frozen weights (Hu et al., arXiv 2106.09685).

    y = W x + s · B (A x)      A [rank, in], B [out, rank],  s = alpha / rank, with `rs` alpha / √rank

rsLoRA's scale (Kalajdzievski, arXiv 2312.03732) keeps the update's size independent of the rank. Module names are
Hugging Face's, so adapters are compatible with `peft`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.section import Section

Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION: tuple[Module, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES: tuple[Module, ...] = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


class Lora(Section):
    """LoRA adapters on `target_modules`; all other weights are frozen. Without a rank there are no adapters."""

    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of the adapters. Example: `64`"""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: alpha / rank."""
    rs: bool = False
    """rsLoRA: scale by alpha / √rank."""
    target_modules: tuple[Module, ...] = Field(MODULES, min_length=1, strict=False)
    """Linear layers that get an adapter, in Hugging Face's names."""
    load: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Adapter folder of `peft` to continue from. Example: `adapters/mine`"""

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        assert self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)

    @property
    def shape(self) -> Lora:
        """The settings that define a checkpoint's adapters: all but `load`, with the modules in a fixed order."""
        modules = tuple(name for name in MODULES if name in self.target_modules)
        return self.model_copy(update={"load": None, "target_modules": modules})

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.rank is None and self.load is not None:
            raise ValueError(f"load {self.load} without rank: write the rank of that adapter, or drop load")
        return self

    def __str__(self) -> str:
        if self.rank is None:
            return "no adapters"
        return f"rank {self.rank}, alpha {self.alpha:g}, rs {str(self.rs).lower()}, {', '.join(self.target_modules)}"


def is_adapter(parameter: str) -> bool:
    """Whether a parameter's name is that of an adapter's A or B."""
    return ".lora_A." in parameter or ".lora_B." in parameter
