"""Transformer Engine (TE): our use of its attention and its linear layers, in bf16 and FP8, against float64, and rates.

In a rehearsal stand-ins take their place, and what they are called with is held against the real signatures where the
package is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megalong.attention.exchange import ContextGroups
from megalong.attention.kernels import choose_kernel
from megalong.attention.layout import TokenLayout
from megalong.attention.mask import CAUSAL
from megalong.attention.plan import AttentionPlan, make_plan
from megalong.attention.transformer_engine import EngineAttention
from tests.gpu.exact import exact_attention, relative_error
from tests.gpu.harness import SkipStep, Trial

SCALE = 2 * 128**-0.5  # scores with a standard deviation of 2
NAMES = ("out", "dq", "dk", "dv")
PASSES = 4  # delayed scaling takes its scales from the passes before
FP8_LEAST = 2**-9  # nearer to float64 is bf16, not FP8
BF16_MOST, FP8_MOST = 2e-2, {"out": 2**-3, "dq": 2**-2, "dk": 2**-2, "dv": 2**-2}


def run(trial: Trial) -> None:
    """Attention, documents, linear layers."""
    if trial.rehearse:
        from tests.gpu.steps.engine_stand_in import put_in_place

        put_in_place(trial)
    elif importlib.util.find_spec("transformer_engine") is None:
        raise SkipStep("it needs the package transformer-engine")
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    recipes: Any = importlib.import_module("transformer_engine.common.recipe")
    trial.figure("FP8", str(engine.is_fp8_available(return_reason=True)))
    with trial.part("documents in bf16"):
        _documents(trial)
    delayed = recipes.DelayedScaling(amax_history_len=16, fp8_dpa=True)
    for name, recipe in (("bf16", None), ("fp8 delayed", delayed)):
        with trial.part(f"attention {name}"):
            _attention(trial, name, engine, recipe)
    with trial.part("attention by our kernel"):
        _our_attention(trial)
    scalings = {"bf16": None, "fp8 delayed": recipes.DelayedScaling(amax_history_len=16),
                "fp8 current": recipes.Float8CurrentScaling()}  # fmt: skip
    for name, recipe in scalings.items():
        with trial.part(f"linear {name}"):
            _linear(trial, name, engine, recipe)


def _case(trial: Trial, length: int, heads: int, groups: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(trial.device).manual_seed(0)
    return tuple(
        torch.randn(length, 1, h, 128, generator=generator, device=trial.device).to(torch.bfloat16)
        for h in (heads, groups, groups, heads)
    )


def _attend(
    case: Sequence[torch.Tensor], plan: AttentionPlan, context: Callable[[], Any] = contextlib.nullcontext
) -> Callable[[], list[torch.Tensor]]:
    """What computes out and gradients by `EngineAttention`."""
    q, k, v, grad = case
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    engine = EngineAttention(q.shape[2], k.shape[2], 128, SCALE, None, 1, ContextGroups(), None).to(q.device)

    def once() -> list[torch.Tensor]:
        with context():
            out = engine(*leaves, plan)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    return once


def _documents(trial: Trial) -> None:
    """Each document alone in float64."""
    length = trial.size(1024, 64)
    starts = np.array([0, 1, length // 4, length // 2 + 3])
    case = _case(trial, length, 8, 2)
    found = _attend(case, make_plan(TokenLayout(), length, [starts]))()
    errors = {}
    for name, ours in zip(NAMES, found, strict=True):
        true = torch.zeros(ours.shape, dtype=torch.float64, device=ours.device)
        for first, stop in zip(starts, np.append(starts[1:], length), strict=True):
            part = [t[first:stop] for t in case]
            true[first:stop] = exact_attention(*part, causal=True, scale=SCALE)[name]
        errors[name] = relative_error(ours.detach(), true)
    trial.near("documents in bf16", errors, BF16_MOST)


def _attention(trial: Trial, name: str, engine: Any, recipe: Any) -> None:
    def context() -> Any:
        return contextlib.nullcontext() if recipe is None else engine.autocast(enabled=True, recipe=recipe)

    length = trial.size(1024, 64)
    case = _case(trial, length, 32, 8)
    once = _attend(case, make_plan(TokenLayout(), length), context)
    for _ in range(PASSES):
        found = once()
    truth = exact_attention(*case, causal=True, scale=SCALE)
    errors = {part: relative_error(ours.detach(), truth[part]) for part, ours in zip(NAMES, found, strict=True)}
    _judge(trial, f"attention {name}", errors, recipe is not None)
    length = trial.size(1 << 14, 64)
    once = _attend(_case(trial, length, 32, 8), make_plan(TokenLayout(), length), context)
    flops = 3.5 * 2 * length**2 * 32 * 128
    trial.rate(f"attention {name} forward and backward TFLOP/s", once, flops, headline=True)


def _our_attention(trial: Trial) -> None:
    length = trial.size(1 << 14, 64)
    q, k, v, grad = _case(trial, length, 32, 8)
    kernel = choose_kernel(q)

    def once() -> None:
        out, lse = kernel.forward(q, k, v, CAUSAL, 0.1)
        kernel.backward(grad, q, k, v, out, lse, CAUSAL, 0.1)

    trial.rate("attention ours forward and backward TFLOP/s", once, 3.5 * 2 * length**2 * 32 * 128, headline=True)


def _judge(trial: Trial, name: str, errors: dict[str, float], fp8: bool) -> None:
    trial.near(name, errors, {part: FP8_MOST.get(part, 2**-2) for part in errors} if fp8 else BF16_MOST)
    if fp8 and not trial.rehearse:
        trial.check(f"{name} is computed in FP8", errors["out"] > FP8_LEAST, f"{errors['out']:.1e}")


def _linear(trial: Trial, name: str, engine: Any, recipe: Any) -> None:
    tokens, inputs, outputs = trial.size(8192, 32), trial.size(4096, 32), trial.size(14336, 48)
    layer = engine.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device=str(trial.device))
    x, grad = (torch.randn(tokens, width, device=trial.device, dtype=torch.bfloat16) for width in (inputs, outputs))
    x.requires_grad_()
    weight = layer.weight

    def once() -> list[torch.Tensor]:
        with contextlib.nullcontext() if recipe is None else engine.autocast(enabled=True, recipe=recipe):
            out = layer(x)
        return [out, *torch.autograd.grad(out, (x, weight), grad)]

    for _ in range(PASSES):
        found = once()
    x64, w64, grad64 = (t.detach().double() for t in (x, weight, grad))
    truth = {"out": x64 @ w64.t(), "input's gradient": grad64 @ w64, "weight's gradient": grad64.t() @ x64}
    errors = {
        part: relative_error(ours.detach(), true) for (part, true), ours in zip(truth.items(), found, strict=True)
    }
    _judge(trial, f"linear {name}", errors, recipe is not None)
    trial.rate(f"linear {name} forward and backward TFLOP/s", once, 3 * 2.0 * tokens * inputs * outputs, headline=True)
