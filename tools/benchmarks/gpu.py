"""Attention on one GPU, forward and backward: TFLOP/s of each backend beside torch's SDPA and the chip's matmul rate.

Shapes of Llama 3.1 8B without tensor parallelism: 32 query and 8 key heads of 128 channels, bf16, causal, one sequence.
FLOPs are those of the causal half, 2 products forward and 5 backward: 3.5 x 2 x S^2 x heads x channels. The physical
limit is the matmul rate, measured here with a product of 8192 x 8192 matrices; flash kernels reach two thirds of it.

    ours          the kernel `attention.backend: auto` takes (cuDNN on Hopper where it agrees with flash)
    flash         FlashAttention-2 as built into torch, through our blocks
    sdpa          torch.nn.functional.scaled_dot_product_attention, torch's own choice
    te, te_fp8    Transformer Engine in bf16, and in FP8 with delayed scaling, where it is installed
    documents     ours over log-normal documents of about 4,000 tokens, counted by the pairs they attend

Run it with `python tools/benchmark.py gpu` on a machine with a GPU; elsewhere it says that there is none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from benchmarks import Report

HEADS, GROUPS, HEAD_DIM = 32, 8, 128
LENGTHS = {"32k": 1 << 15, "128k": 1 << 17, "512k": 1 << 19}
SECONDS = 2.0  # of repetitions at each point, one at least
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run() -> Report:
    """Measure; figures are TFLOP/s by length and backend, and the matmul rate."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmark gpu: torch sees no GPU here; run it on a machine that has one")
    figures = {"matmul_tflops": _matmul_rate()}
    lines = [
        f"attention forward + backward on {torch.cuda.get_device_name()}, {HEADS} heads, {GROUPS} groups, "
        f"d {HEAD_DIM}, bf16, causal: TFLOP/s (share of the matmul rate)",
        f"matmul {figures['matmul_tflops']:.0f} TFLOP/s",
    ]
    for label, length in LENGTHS.items():
        for name, (step, share) in _backends(length).items():
            try:
                rate = _rate(step, length) * share
            except Exception as error:  # a backend that cannot is a row of its own, not the end of the table
                lines.append(f"{label:>6} {name:12} {str(error).strip().splitlines()[0][:90]}")
                continue
            figures[f"{name}_tflops_{label}"] = round(rate, 1)
            lines.append(f"{label:>6} {name:12} {rate:8.0f}  ({rate / figures['matmul_tflops']:.0%})")
    return Report(figures, "\n".join(lines))


def _backends(length: int) -> dict[str, tuple[Step, float]]:
    """Each backend's step, and the share of the causal pairs it computes."""
    from megalong.attention.kernels import FLASH, choose_kernel

    probe = torch.empty(1, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    documents = _starts(length)
    lengths = np.diff(documents, append=length).astype(np.float64)
    share = float((lengths * (lengths + 1)).sum() / (length * (length + 1)))
    return {
        "ours": (_ours(choose_kernel(probe), length, None), 1.0),
        "flash": (_ours(FLASH, length, None), 1.0),
        "documents": (_ours(choose_kernel(probe), length, documents), share),
        "sdpa": (_sdpa, 1.0),
        "te": (_engine(fp8=False), 1.0),
        "te_fp8": (_engine(fp8=True), 1.0),
    }


def _ours(kernel: Any, length: int, documents: np.ndarray | None) -> Step:
    from megalong.attention.exchange import ContextGroups, context_attention
    from megalong.attention.layout import TokenLayout
    from megalong.attention.plan import make_plan

    plan = make_plan(TokenLayout(), length, None if documents is None else [documents])
    return lambda q, k, v: context_attention(q, k, v, plan, ContextGroups(), kernel, HEAD_DIM**-0.5)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def _engine(fp8: bool) -> Step:
    """Made at the first step, so that a missing or broken Transformer Engine is told in its row."""
    made: list[Any] = []

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        engine: Any = importlib.import_module("transformer_engine.pytorch")
        if not made:
            made.append(
                engine.DotProductAttention(
                    HEADS, HEAD_DIM, num_gqa_groups=GROUPS, attention_dropout=0.0, qkv_format="sbhd",
                    attn_mask_type="causal",
                )
            )  # fmt: skip
        context: Any = nullcontext()
        if fp8:
            recipe: Any = importlib.import_module("transformer_engine.common.recipe")
            delayed = recipe.DelayedScaling(fp8_dpa=True)
            context = engine.fp8_autocast(enabled=True, fp8_recipe=delayed)
        with context:
            out: torch.Tensor = made[0](q, k, v)
        return out.view(*q.shape)

    return step


def _rate(step: Step, length: int) -> float:
    """TFLOP/s of the causal half."""
    q, k, v = (
        torch.randn(length, 1, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    upstream = torch.randn_like(q)

    def once() -> None:
        torch.autograd.grad(step(q, k, v), (q, k, v), upstream)

    return 3.5 * 2 * length**2 * HEADS * HEAD_DIM / _seconds(once) / 1e12


def _matmul_rate() -> float:
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return round(2 * size**3 / _seconds(lambda: a @ b) / 1e12, 1)


def _seconds(work: Callable[[], Any]) -> float:
    """Of one repetition, warmed up, by the device's clock."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    times = max(1, int(SECONDS / (begin.elapsed_time(end) / 1e3)))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def _starts(length: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(4000), 1.0, size=length).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    return starts[starts < length]
