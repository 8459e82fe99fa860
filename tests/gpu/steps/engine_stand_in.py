"""Stand-ins of Transformer Engine for a rehearsal on the CPU: torch computes, calls are held against the real ones."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

import torch

from megalong.attention import transformer_engine
from tests.attention.test_transformer_engine import DotProductAttention
from tests.gpu.harness import Trial


class Linear(torch.nn.Linear):
    """As far as it is used."""

    def __init__(self, in_features: int, out_features: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=params_dtype, device=device)


class Recipe:
    """Of either scaling."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


def put_in_place(trial: Trial) -> None:
    """Let `transformer_engine` be the stand-ins in this process, checked against the package where there is one."""
    real = _real()
    trial.figure("signatures", "held against the installed package" if real else "no package to hold them against")
    package, common, module, recipe = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".common", ".pytorch", ".common.recipe")
    )
    module.is_fp8_available = lambda return_reason: (False, "a stand-in")  # type: ignore[attr-defined]
    module.autocast = _checked(lambda enabled, recipe: contextlib.nullcontext(), real.get("autocast"))  # type: ignore[attr-defined]
    for name, stand_in in (("DotProductAttention", DotProductAttention), ("Linear", Linear)):
        setattr(module, name, _checked(stand_in, real.get(name)))
    for name in ("DelayedScaling", "Float8CurrentScaling"):
        setattr(recipe, name, _checked(Recipe, real.get(name)))
    for one in (package, common, module, recipe):
        sys.modules[one.__name__] = one
    transformer_engine._second_stream = lambda: None  # type: ignore[assignment]


def _real() -> dict[str, Any]:
    """The package's own classes, if it can be imported here."""
    try:
        engine: Any = importlib.import_module("transformer_engine.pytorch")
        recipe: Any = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:  # without its CUDA part it raises whatever it meets first
        print(f"transformer_engine: {type(error).__name__}: {error}")
        return {}
    names = {"DotProductAttention": engine, "Linear": engine, "autocast": engine,
             "DelayedScaling": recipe, "Float8CurrentScaling": recipe}  # fmt: skip
    return {name: getattr(module, name) for name, module in names.items()}


def _checked(stand_in: Any, real: Any) -> Any:
    """The stand-in, called only with what the real one takes, in calls of what it makes as well."""
    if real is None:
        return stand_in

    def made(*arguments: Any, **options: Any) -> Any:
        inspect.signature(real).bind(*arguments, **options)
        found = stand_in(*arguments, **options)
        if isinstance(found, torch.nn.Module):
            takes = inspect.signature(real.forward)
            found.register_forward_pre_hook(
                lambda module, args, kwargs: (takes.bind(module, *args, **kwargs), None)[1], with_kwargs=True
            )
        return found

    return made
