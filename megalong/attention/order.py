"""Reorder the concatenated tokens of several ranks into sequence order, and back.

Gathered shards are in rank order; causal kernels need sequence order. Rows of a batch with different documents may have
different layouts; they are then reordered one by one.
"""

from __future__ import annotations

import numpy as np
import torch

from megalong.attention import upload
from megalong.attention.plan import AttentionPlan


def to_sequence_order(
    tokens: torch.Tensor, plan: AttentionPlan, ranks: slice, joined: int = 1, dim: int = 0
) -> torch.Tensor:
    """Sort the tokens of `ranks` (groups of `joined` ranks), concatenated along `dim`, by position.

    `tokens` has its batch in dimension `dim + 1`. Differentiable.
    """
    return _reordered(tokens, _indices(plan, ranks, joined, tokens.device, inverse=False), dim)


def from_sequence_order(
    tokens: torch.Tensor, plan: AttentionPlan, ranks: slice, joined: int = 1, dim: int = 0
) -> torch.Tensor:
    """The inverse of `to_sequence_order`."""
    return _reordered(tokens, _indices(plan, ranks, joined, tokens.device, inverse=True), dim)


def _indices(plan: AttentionPlan, ranks: slice, joined: int, device: torch.device, inverse: bool) -> list[torch.Tensor]:
    """int64, on `device`: one for all rows of the batch, or one per row."""

    def uploaded() -> list[torch.Tensor]:
        orders = plan.orders(ranks, joined)
        return [upload.to_device(np.argsort(order) if inverse else order, device) for order in orders]

    return plan.cached(("order on device", ranks.start, ranks.stop, joined, device, inverse), uploaded)


def _reordered(tokens: torch.Tensor, indices: list[torch.Tensor], dim: int) -> torch.Tensor:
    if len(indices) == 1:
        return tokens.index_select(dim, indices[0])
    rows = [row.index_select(dim, index) for row, index in zip(tokens.unbind(dim + 1), indices, strict=True)]
    return torch.stack(rows, dim + 1)
