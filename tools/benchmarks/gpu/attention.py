"""Rates of attention, forward and backward, by implementation; the package documents them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.device import median_time
from benchmarks.gpu.rows import ATTENTION_SECONDS, HEAD_DIM, Row, attention_flops, attention_heads

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention_rate(row: Row, device: torch.device) -> float:
    """FLOP/s; with documents, only attended pairs are counted."""
    heads, groups = attention_heads(row.tokens)
    q, k, v = (
        torch.randn(row.tokens, 1, h, HEAD_DIM, device=device, dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, groups, groups)
    )
    upstream = torch.randn_like(q)
    attend, share = _attend(row.side, q, k)

    def once() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), upstream)

    return share * attention_flops(row.tokens, heads) / median_time(once, device, ATTENTION_SECONDS)


def _attend(side: str, q: torch.Tensor, k: torch.Tensor) -> tuple[Attend, float]:
    """The attention function, and the share of the causal pairs that it computes."""
    from megalong.attention.kernels import FLASH, choose_kernel

    if side == "sdpa":
        return _sdpa, 1.0
    if side in ("te", "te_fp8"):
        return _engine(q.shape[2], k.shape[2], fp8=side == "te_fp8"), 1.0
    if side != "documents":
        return _ours(FLASH if side == "flash" else choose_kernel(q), len(q), None), 1.0
    starts = document_starts(len(q))
    lengths = np.diff(starts, append=len(q)).astype(np.float64)
    share = float((lengths * (lengths + 1)).sum() / (len(q) * (len(q) + 1)))
    return _ours(choose_kernel(q), len(q), starts), share


def _ours(kernel: Any, length: int, documents: np.ndarray | None) -> Attend:
    from megalong.attention.exchange import ContextGroups, context_attention
    from megalong.attention.layout import TokenLayout
    from megalong.attention.plan import make_plan

    plan = make_plan(TokenLayout(), length, None if documents is None else [documents])
    return lambda q, k, v: context_attention(q, k, v, plan, ContextGroups(), kernel, HEAD_DIM**-0.5)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def _engine(heads: int, groups: int, fp8: bool) -> Attend:
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    recipe: Any = importlib.import_module("transformer_engine.common.recipe")
    attention = engine.DotProductAttention(
        heads, HEAD_DIM, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"
    )

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        delayed = recipe.DelayedScaling(fp8_dpa=True)
        with engine.autocast(enabled=True, recipe=delayed) if fp8 else nullcontext():
            out: torch.Tensor = attention(q, k, v)
        return out.view(*q.shape)

    return attend


def document_starts(length: int, mean: float = 4000.0, seed: int = 0) -> np.ndarray:
    """First tokens of log-normal documents of about `mean` tokens that fill `length`: int64, from 0."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean), 1.0, size=length).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    return np.asarray(starts[starts < length])
