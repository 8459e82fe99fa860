"""Rates of a recipe's attention: 1M tokens, TP 8 x CP 4 give a rank 262,144 tokens, 4 query heads and 1 key head.

    causal      the rank's own keys
    half keys   all queries to the early half of another rank's keys       (its late chunk lies behind all of them)
    half rows   the late half of the queries to all keys of another rank   (the early chunk lies before all of them)

Each of them is the same work: 2 products forward, 5 backward, 2 operations, half of 262,144² pairs.
"""

from __future__ import annotations

import torch

from megalong.attention.kernels import CPU, CUDNN, FLASH, BlockKernel
from megalong.attention.mask import CAUSAL, FULL, BlockMask
from tests.gpu.harness import Trial

HEADS, GROUPS, CHANNELS = 4, 1, 128
SCALE = CHANNELS**-0.5


def run(trial: Trial) -> None:
    """cuDNN beside flash."""
    tokens = trial.size(1 << 18, 64)
    cases = {"causal": (tokens, tokens, CAUSAL), "half keys": (tokens, tokens // 2, FULL),
             "half rows": (tokens // 2, tokens, FULL)}  # fmt: skip
    for name, (queries, keys, mask) in cases.items():
        for kernel in [CPU] if trial.rehearse else [CUDNN, FLASH]:
            with trial.part(f"{kernel.name}, {name}"):
                _rates(trial, kernel, name, queries, keys, mask)


def _rates(trial: Trial, kernel: BlockKernel, name: str, queries: int, keys: int, mask: BlockMask) -> None:
    q, k, v, grad = (
        torch.randn(length, 1, heads, CHANNELS, device=trial.device, dtype=torch.bfloat16)
        for length, heads in ((queries, HEADS), (keys, GROUPS), (keys, GROUPS), (queries, HEADS))
    )
    pairs = queries * keys / (2 if mask == CAUSAL else 1)
    out, lse = kernel.forward(q, k, v, mask, SCALE)
    product = 2 * pairs * HEADS * CHANNELS
    headline = name == "causal"
    trial.rate(
        f"{kernel.name} {name} forward TFLOP/s", lambda: kernel.forward(q, k, v, mask, SCALE), 2 * product, headline
    )
    trial.rate(
        f"{kernel.name} {name} backward TFLOP/s",
        lambda: kernel.backward(grad, q, k, v, out, lse, mask, SCALE),
        5 * product,
        headline,
    )
