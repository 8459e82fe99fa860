"""torch's fused CPU kernel, extended to the masks of long context.

The kernel supports three masks: none, causal with as many queries as keys, and one given as a table. A block between
two diagonals is cut into parts with these masks; tables are made only for the tiles that a diagonal crosses.

    causal, keys begin earlier       window of W
    ....full....|\\                     \\full\\
                | \\                     \\full\\       one tile of queries: cut by the lower diagonal | full |
                |__\\                     \\full\\      cut by the upper one, merged by log-sum-exp

For a query without keys, torch's kernel returns a log-sum-exp of 0; here it is -inf, as `BlockKernel` requires.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megalong.attention.mask import BlockMask
from megalong.attention.merge import empty_result, finite, merge

TILE_QUERIES = 256  # per tile of a block that a diagonal crosses: a table of 256 x 256, 256 wasted pairs per query

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Part:
    """The part of a block that one call of torch's kernel computes."""

    rows: slice
    keys: slice
    causal: bool = False
    hidden: torch.Tensor | None = None

    def covers(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether this part is the whole block."""
        return self.rows == slice(0, q.shape[0]) and self.keys == slice(0, k.shape[0])

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The table that torch's kernel adds to the scores."""
        if self.hidden is None:
            return None
        return torch.zeros(self.hidden.shape, dtype=dtype).masked_fill_(self.hidden, float("-inf"))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BlockKernel.forward`."""
    parts = list(_parts(q.shape[0], k.shape[0], mask))
    if parts and parts[0].covers(q, k):
        return _forward_part(q, k, v, parts[0], scale)
    out, lse = empty_result(q, v.shape[-1])
    for part in parts:
        merge(out[part.rows], lse[..., part.rows], *_forward_part(q, k, v, part, scale))
    return out.to(q.dtype), lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `BlockKernel.backward`."""
    parts = list(_parts(q.shape[0], k.shape[0], mask))
    if parts and parts[0].covers(q, k):
        return _backward_part(grad_out, q, k, v, out, lse, parts[0], scale)
    grads = tuple(torch.zeros_like(t, dtype=torch.float32) for t in (q, k, v))
    for part in parts:
        shares = _backward_part(grad_out, q, k, v, out, lse, part, scale)
        for total, share, where in zip(grads, shares, (part.rows, part.keys, part.keys), strict=True):
            total[where] += share
    return grads[0], grads[1], grads[2]


def _parts(queries: int, keys: int, mask: BlockMask) -> Iterator[_Part]:
    if mask.lower is None and mask.upper is None:
        yield _Part(slice(0, queries), slice(0, keys))
    elif mask.lower is None and mask.upper == keys - queries and keys >= queries:
        if keys > queries:
            yield _Part(slice(0, queries), slice(0, keys - queries))
        yield _Part(slice(0, queries), slice(keys - queries, keys), causal=True)
    else:
        for start in range(0, queries, TILE_QUERIES):
            yield from _tile_parts(range(start, min(start + TILE_QUERIES, queries)), keys, mask)


def _tile_parts(rows: range, keys: int, mask: BlockMask) -> Iterator[_Part]:
    """A tile's keys in order: crossed by the lower diagonal, seen by all queries, crossed by the upper one."""
    seen = mask.keys_of(rows, keys)
    begin = seen.start if mask.lower is None else min(seen.stop, max(seen.start, rows.stop - 1 + mask.lower))
    end = seen.stop if mask.upper is None else max(begin, min(seen.stop, rows.start + mask.upper + 1))
    for first, last in ((seen.start, begin), (begin, end), (end, seen.stop)):
        if first < last:
            hidden = mask.hidden(rows, range(first, last), torch.device("cpu"))
            yield _Part(slice(rows.start, rows.stop), slice(first, last), hidden=hidden)


def _forward_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: _Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = _heads_first(q[part.rows], k[part.keys], v[part.keys])
    out, lse = _FORWARD(*tensors, 0.0, part.causal, attn_mask=part.bias(q.dtype), scale=scale)
    if part.hidden is not None:
        lse = lse.masked_fill(part.hidden.all(-1), float("-inf"))
    return _sequence_first(out)[0], lse


def _backward_part(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    part: _Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch sums a group's key gradients in the type of the keys: an error of 2e-2 in bf16 with 8 heads per group.

    So below float32, torch gets one query head of each group at a time, and we sum in float32.
    """
    rows, keys = part.rows, part.keys
    grad_out, q, k, v, out = _heads_first(grad_out[rows], q[rows], k[keys], v[keys], out[rows])
    lse = finite(lse[..., rows])
    group_size = 1 if q.dtype == torch.float32 else q.shape[1] // k.shape[1]
    bias = part.bias(q.dtype)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
    for first in range(group_size):
        one = slice(first, None, group_size)  # with a group size of 1: all heads at once
        grads = _BACKWARD(
            grad_out[:, one], q[:, one], k, v, out[:, one], lse[:, one], 0.0, part.causal, attn_mask=bias, scale=scale
        )
        grad_q[:, one] = grads[0]
        grad_k += grads[1]
        grad_v += grads[2]
    dq, dk, dv = _sequence_first(grad_q, grad_k, grad_v)
    return dq, dk, dv


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[s, b, h, d]` viewed as torch's `[b, h, s, d]`; the kernel accepts any stride except in the last dimension."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).permute(1, 2, 0, 3) for t in tensors)


def _sequence_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.permute(2, 0, 1, 3) for t in tensors)
