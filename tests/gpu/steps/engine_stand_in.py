"""Stand-ins of Transformer Engine for a rehearsal on the CPU: torch computes, calls are held against the real ones."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any

import torch

from megalong.attention import transformer_engine
from tests.attention.test_transformer_engine import DotProductAttention
from tests.gpu.harness import Trial
from tests.signatures import checked, recorded


class Linear(torch.nn.Linear):
    """As far as it is used."""

    def __init__(self, in_features: int, out_features: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=params_dtype, device=device)


class Recipe:
    """Of either scaling."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


def put_in_place(trial: Trial) -> None:
    """Let `transformer_engine` be the stand-ins in this process."""
    trial.figure("signatures", f"held against {', '.join(one for one in recorded() if one.startswith('transformer'))}")
    package, common, module, recipe = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".common", ".pytorch", ".common.recipe")
    )
    stand_ins = {
        module: {
            "is_fp8_available": lambda return_reason: (False, "a stand-in"),
            "autocast": lambda enabled, recipe: contextlib.nullcontext(),
            "DotProductAttention": DotProductAttention,
            "Linear": Linear,
        },
        recipe: {"DelayedScaling": Recipe, "Float8CurrentScaling": Recipe},
    }
    for owner, members in stand_ins.items():
        for name, stand_in in members.items():
            setattr(owner, name, checked(stand_in, f"{owner.__name__}.{name}"))
    for one in (package, common, module, recipe):
        sys.modules[one.__name__] = one
    transformer_engine._second_stream = lambda: None  # type: ignore[assignment]
