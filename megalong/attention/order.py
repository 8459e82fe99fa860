"""Tokens of several ranks, laid end to end, into the order of their sequence and back.

Gathered shards come rank after rank; causal kernels want first tokens first. Rows of a batch whose documents differ
may lie differently and are then ordered one by one.
"""

from __future__ import annotations

import numpy as np
import torch

from megalong.attention.plan import AttentionPlan


def to_sequence_order(
    tokens: torch.Tensor, plan: AttentionPlan, ranks: slice, joined: int = 1, dim: int = 0
) -> torch.Tensor:
    """The tokens of `ranks` (of groups of `joined` ranks), end to end along `dim`, in ascending order of position.

    `tokens` has its batch in dimension `dim + 1`. Differentiable.
    """
    return _reordered(tokens, plan.orders(ranks, joined), dim)


def from_sequence_order(
    tokens: torch.Tensor, plan: AttentionPlan, ranks: slice, joined: int = 1, dim: int = 0
) -> torch.Tensor:
    """The inverse of `to_sequence_order`."""
    return _reordered(tokens, [np.argsort(order) for order in plan.orders(ranks, joined)], dim)


def _reordered(tokens: torch.Tensor, orders: list[np.ndarray], dim: int) -> torch.Tensor:
    indices = [torch.from_numpy(order).to(tokens.device) for order in orders]
    if len(indices) == 1:
        return tokens.index_select(dim, indices[0])
    rows = [row.index_select(dim, index) for row, index in zip(tokens.unbind(dim + 1), indices, strict=True)]
    return torch.stack(rows, dim + 1)
