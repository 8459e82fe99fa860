"""Causal attention over a context-parallel group: keys and values travel round a ring of ranks.

Every rank keeps its queries. In step i it holds the keys and values of the rank i places before it, attends to what
the causal mask leaves of them (layout.py), and meanwhile passes them on to the next rank and receives the next ones:

    n = 4, rank 2     step 0: own keys    1: rank 1's    2: rank 0's    3: rank 3's

Results of blocks merge by their log-sum-exp. With (O, L) so far and (o, l) from a new block,

    O <- O + sigmoid(l - L) (o - O)        L <- log(e^L + e^l)

in float32. Backward goes round again with the merged O and L. The gradients of keys and values travel one step behind
them, each rank adding its share in float32, and after the last step one more hop brings them home. They are added in
the order of the ring, so the same run gives the same bits.

A rank holds two pieces of keys and values at a time, whatever the group's size, and never scores of all queries by
all keys. The trade-off against gathering all keys once: n-1 messages that hide behind compute, for n times less memory.
Source: ring attention arXiv 2310.01889; zigzag as in public ring attention implementations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megalong.attention.kernels import BlockKernel, choose_kernel
from megalong.attention.layout import Block, ZigzagLayout
from megalong.attention.mask import CAUSAL, FULL
from megalong.attention.merge import merge

KEYS_TAG, GRADIENTS_TAG = 0, 1  # two streams between the same pair of ranks, which gloo tells apart by tag


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal self-attention of a sequence that lies in zigzag on the ranks of `group` (None: this rank has it all).

    q `[s, b, h, d]`, k and v `[s, b, g, d]`, where g divides h and s tokens are this rank's (even, if there are other
    ranks). Returns `[s, b, h, d]` of q's type. Differentiable in q, k and v. All ranks of the group must call it, and
    its backward, in the same order. `backend` is `attention.backend` of the configuration.
    """
    out: torch.Tensor = _RingAttention.apply(q, k, v, softmax_scale, _Ring.of(group), choose_kernel(q, backend))
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        ring: "_Ring",
        kernel: BlockKernel,
    ) -> torch.Tensor:
        out, lse = _forward(q, k, v, scale, ring, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.ring, ctx.kernel = scale, ring, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward(grad_out, q, k, v, out, lse, ctx.scale, ctx.ring, ctx.kernel)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, ring: "_Ring", kernel: BlockKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result of q's type and float32 log-sum-exp `[b, h, s]`, over the keys of all ranks."""
    if ring.size == 1:
        return kernel.forward(q, k, v, CAUSAL, scale)
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = q.new_full((*q.shape[1:3], q.shape[0]), float("-inf"), dtype=torch.float32)  # no key seen yet
    for step, pair in enumerate(ring.travel(torch.stack((k, v)))):
        block = ring.block(q, step)
        rows, (keys, values) = block.queries, pair[:, block.keys]
        new_out, new_lse = kernel.forward(q[rows], keys, values, CAUSAL if block.causal else FULL, scale)
        merge(out[rows], lse[..., rows], new_out, new_lse)
    return out.to(q.dtype), lse


def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    ring: "_Ring",
    kernel: BlockKernel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; float32 where more than one block was added up."""
    if ring.size == 1:
        return kernel.backward(grad_out, q, k, v, out, lse, CAUSAL, scale)
    own_pair = torch.stack((k, v))
    grad_q = torch.zeros_like(q, dtype=torch.float32)
    homeward = _Arrival.of(torch.zeros_like(own_pair, dtype=torch.float32))
    for step, pair in enumerate(ring.travel(own_pair)):
        block = ring.block(q, step)
        rows, (keys, values) = block.queries, pair[:, block.keys]
        dq, dk, dv = kernel.backward(
            grad_out[rows], q[rows], keys, values, out[rows], lse[..., rows], CAUSAL if block.causal else FULL, scale
        )
        grad_q[rows] += dq
        grad_pair = homeward.wait()
        grad_pair[0, block.keys] += dk
        grad_pair[1, block.keys] += dv
        homeward = ring.pass_on(grad_pair, GRADIENTS_TAG)
    dk, dv = homeward.wait()
    return grad_q, dk, dv


@dataclass(frozen=True)
class _Arrival:
    """A tensor on its way to us, and the one on its way from us, which must outlive the sending."""

    requests: list[Any]
    incoming: torch.Tensor
    outgoing: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Arrival":
        """One that is here already."""
        return cls([], tensor, tensor)

    def wait(self) -> torch.Tensor:
        for request in self.requests:
            request.wait()
        return self.incoming


@dataclass(frozen=True)
class _Ring:
    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> "_Ring":
        if group is None:
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def block(self, q: torch.Tensor, step: int) -> Block:
        """What our queries see in step `step`, when we hold the keys of the rank `step` places before us."""
        return ZigzagLayout(self.size).visible(q.shape[0], self.rank, (self.rank - step) % self.size)

    def travel(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Every rank's tensor in turn, our own first; while one is used, the next is on its way."""
        for step in range(self.size):
            arrival = self.pass_on(tensor, KEYS_TAG) if step + 1 < self.size else _Arrival.of(tensor)
            yield tensor
            tensor = arrival.wait()

    def pass_on(self, tensor: torch.Tensor, tag: int) -> _Arrival:
        """Start sending `tensor` to the next rank and receiving its like from the one before."""
        incoming = torch.empty_like(tensor)
        following, preceding = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        send = dist.P2POp(dist.isend, tensor, group=self.group, tag=tag, group_peer=following)
        receive = dist.P2POp(dist.irecv, incoming, group=self.group, tag=tag, group_peer=preceding)
        return _Arrival(dist.batch_isend_irecv([send, receive]), incoming, tensor)
