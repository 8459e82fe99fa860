"""How the ranks of a context-parallel group share one attention: by keys, by heads, or by both.

    ring          every rank keeps its queries, keys travel                                    (transport.py)
    all_gather    every rank keeps its queries and receives all keys                           (transport.py)
    ulysses       every rank swaps its tokens for the whole sequence of a part of the heads    (here)
    ring_ulysses  ulysses among `heads_size` neighbouring ranks (a node), a ring between such groups

With 8 ranks and `heads_size` 4, ranks 0-3 and 4-7 swap tokens for heads among themselves; then rank 1 and rank 5, which
hold the same heads, pass keys to each other. `ulysses` is the same with one group, so one code path serves all four.

If there are fewer key heads than ranks, a key head is copied to every rank that holds a query head of its group;
autograd sums their gradients.
Source: DeepSpeed-Ulysses arXiv 2309.14509; the two levels as in USP, arXiv 2405.07719.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megalong.attention.blockwise import BlockwiseAttention, blockwise_attention
from megalong.attention.kernels import BlockKernel
from megalong.attention.order import from_sequence_order, to_sequence_order
from megalong.attention.plan import AttentionPlan
from megalong.attention.transport import AllGather, Alone, Ring, Transport
from megalong.config.exchange import heads_can_be_shared

Keys = Literal["ring", "all_gather"]


@dataclass(frozen=True)
class ContextGroups:
    """The process groups that share attention, None where a level has one rank.

    `heads`: neighbouring ranks that swap tokens for heads. `keys`: ranks with the same index in their `heads` groups,
    between which keys travel by `transport`.
    """

    heads: dist.ProcessGroup | None = None
    keys: dist.ProcessGroup | None = None
    transport: Keys = "ring"

    @property
    def heads_size(self) -> int:
        """Number of ranks that share heads."""
        return 1 if self.heads is None else dist.get_world_size(self.heads)

    def make_transport(self) -> Transport:
        """A new transport for one attention call."""
        if self.keys is None:
            return Alone()
        return Ring(self.keys) if self.transport == "ring" else AllGather(self.keys, self.heads_size)

    def members(self) -> slice:
        """The context-parallel ranks in this rank's `heads` group."""
        first = 0 if self.keys is None else dist.get_rank(self.keys) * self.heads_size
        return slice(first, first + self.heads_size)


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    groups: ContextGroups,
    kernel: BlockKernel,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal self-attention of sequences that `plan` distributes over context-parallel ranks.

    Args:
        q: `[s, b, h, d]`, s this rank's tokens. k, v: `[s, b, g, d]`, g divides h.
        scale: of the scores.
        window: maximum number of keys that a query attends to, its own included.

    Returns:
        `[s, b, h, d]` in q's dtype, differentiable once in q, k and v. All ranks must run forward and backward in the
        same order.
    """
    attention = BlockwiseAttention(plan, groups.make_transport(), kernel, scale, window, groups.heads_size)
    if groups.heads is None:
        return blockwise_attention(q, k, v, attention)
    group, members = groups.heads, groups.members()
    q, k, v = (_AllToAll.apply(t, group, True) for t in (q, *_repeat_heads(q, k, v, groups.heads_size)))
    q, k, v = (to_sequence_order(t, plan, members) for t in (q, k, v))
    out = blockwise_attention(q, k, v, attention)
    result: torch.Tensor = _AllToAll.apply(from_sequence_order(out, plan, members), group, False)
    return result


def _repeat_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with heads repeated to at least one per rank, on the same rank as their query heads."""
    heads, groups = q.shape[2], k.shape[2]
    assert heads_can_be_shared(heads, groups, ranks)
    if groups % ranks == 0:
        return k, v
    return k.repeat_interleave(ranks // groups, dim=2), v.repeat_interleave(ranks // groups, dim=2)


class _AllToAll(torch.autograd.Function):
    """`[s, b, h, d]` to `[n s, b, h / n, d]`, rank after rank, or the inverse; each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _all_to_all(tensor, group, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(grad, ctx.group, not ctx.to_heads), None, None


def _all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    if to_heads:
        outgoing = tensor.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
    else:
        outgoing = tensor.unflatten(0, (ranks, -1)).contiguous()
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    if to_heads:
        return incoming.flatten(0, 1)
    return incoming.permute(1, 2, 0, 3, 4).flatten(2, 3)
