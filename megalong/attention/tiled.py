"""Block attention in plain torch, a tile of queries at a time, for tensors that no fused kernel supports.

With scores S = scale * Q K^T, log-sum-exp L and result O = exp(S - L) V, the gradients are, row by row,

    P  = exp(S - L)            dV = P^T dO
    dS = P * (dO V^T - D)      dQ = scale * dS K,  dK = scale * dS^T Q,  with D = rowsum(dO * O)

A tile of queries needs scores only against the keys it may see, and tiles are small enough for their scores to fit
`SCORES_PER_TILE` at any length. Everything is float32: this path is correct, not fast.

The products with P and dS can use rounded ones: FP8 emulation does this (fp8.py).
"""

from collections.abc import Callable, Iterator

import torch

from megalong.attention.mask import BlockMask
from megalong.attention.merge import finite

SCORES_PER_TILE = 1 << 26  # 256 MiB in float32

Rounding = Callable[[torch.Tensor], torch.Tensor]


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    scale: float,
    round_weights: Rounding = _exact,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BlockKernel.forward`. `round_weights` is applied to exp(S - L), keys along the last dimension."""
    length, batch, heads, _ = q.shape
    queries, keys, values = _grouped(q, k), _heads_first(k), _heads_first(v)
    out = torch.empty(length, batch, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    for rows, seen, hidden in _tiles(q, k, mask):
        scores = _scores(queries[..., rows, :], keys[..., seen, :], hidden, scale)
        tile_lse = scores.logsumexp(-1, keepdim=True)
        tile_out = round_weights(scores.sub_(finite(tile_lse)).exp_()) @ values[..., seen, :]
        out[rows] = tile_out.flatten(1, 2).permute(2, 0, 1, 3)
        lse[..., rows] = tile_lse.flatten(1, 2).squeeze(-1)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: BlockMask,
    scale: float,
    round_weights: Rounding = _exact,
    round_scores: Rounding = _exact,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `BlockKernel.backward`. `round_weights` is applied to P, `round_scores` to dS."""
    queries, keys, values = _grouped(q, k), _heads_first(k), _heads_first(v)
    upstream, results = _grouped(grad_out, k), _grouped(out, k)
    logs = finite(lse.unflatten(1, (k.shape[2], -1)).unsqueeze(-1))
    grad_q = torch.empty_like(queries, dtype=torch.float32)
    grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
    for rows, seen, hidden in _tiles(q, k, mask):
        tile_q, tile_up = queries[..., rows, :].float(), upstream[..., rows, :].float()
        weights = _scores(tile_q, keys[..., seen, :], hidden, scale).sub_(logs[..., rows, :]).exp_()
        grad_v[..., seen, :] += (round_weights(weights).transpose(-1, -2) @ tile_up).sum(2, keepdim=True)
        share = (tile_up * results[..., rows, :]).sum(-1, keepdim=True)
        grad_scores = (tile_up @ values[..., seen, :].transpose(-1, -2)).sub_(share).mul_(weights)
        grad_scores = round_scores(grad_scores).mul_(scale)
        grad_q[..., rows, :] = grad_scores @ keys[..., seen, :]
        grad_k[..., seen, :] += (grad_scores.transpose(-1, -2) @ tile_q).sum(2, keepdim=True)
    return (
        grad_q.flatten(1, 2).permute(2, 0, 1, 3).to(q.dtype),
        grad_k.squeeze(2).permute(2, 0, 1, 3),
        grad_v.squeeze(2).permute(2, 0, 1, 3),
    )


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    """Keys or values `[m, b, g, d]` as float32 `[b, g, 1, m, d]`, one copy for all query heads of a group."""
    return t.permute(1, 2, 0, 3).unsqueeze(2).float()


def _grouped(t: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`[n, b, h, d]` viewed as `[b, g, h / g, n, d]`."""
    return t.permute(1, 2, 0, 3).unflatten(1, (k.shape[2], -1))


def _tiles(q: torch.Tensor, k: torch.Tensor, mask: BlockMask) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """(rows of queries, keys they may see, mask of hidden pairs), with rows few enough for `SCORES_PER_TILE`."""
    length, batch, heads, _ = q.shape
    count = max(1, SCORES_PER_TILE // (batch * heads * k.shape[0]))
    for start in range(0, length, count):
        rows = range(start, min(start + count, length))
        seen = mask.keys_of(rows, k.shape[0])
        yield slice(rows.start, rows.stop), slice(seen.start, seen.stop), mask.hidden(rows, seen, q.device)


def _scores(q: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (q.float() @ keys.transpose(-1, -2)).mul_(scale)
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))
