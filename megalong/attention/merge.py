"""Merge blocks of the same queries by their log-sum-exp.

With (O, L) so far and (o, l) from a new block,

    O <- O + sigmoid(l - L) (o - O)        L <- log(e^L + e^l)

in float32. A block in which a query sees no key has l = -inf and changes nothing; a query that has seen no key at all
keeps O = 0, L = -inf, and never becomes NaN.
"""

from __future__ import annotations

import torch


def empty_result(q: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of queries `[n, b, h, d]` that have seen no key: float32 `[n, b, h, value_dim]` and `[b, h, n]`."""
    out = q.new_zeros((*q.shape[:-1], value_dim), dtype=torch.float32)
    return out, q.new_full((*q.shape[1:3], q.shape[0]), float("-inf"), dtype=torch.float32)


def merge(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge a block into `out` (float32 `[n, b, h, d]`) and `lse` (float32 `[b, h, n]`), in place."""
    # -inf minus -inf is NaN: where a query sees no key of the new block, its weight is always 0.
    weight = torch.sigmoid(new_lse - lse).masked_fill_(new_lse == float("-inf"), 0.0)
    out.lerp_(new_out.float(), weight.permute(2, 0, 1).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, new_lse))


def finite(lse: torch.Tensor) -> torch.Tensor:
    """Replace -inf by a finite number, so that `exp(score - lse)` of a query without keys is 0, not NaN."""
    return lse.clamp(min=torch.finfo(torch.float32).min)
