"""Attention of a rank's queries to keys that arrive source by source, merged by log-sum-exp.

    forward, for each source of keys:    blocks of the plan → kernel → merged into (out, lse)
    backward, for each source of keys:   kernel with the merged out and lse → parts of the gradients, summed in float32

A transport (transport.py) supplies the keys. The order of sources and blocks is fixed, so the same run gives the same
bits. On a GPU this needs `torch.use_deterministic_algorithms`: otherwise flash sums its gradients of queries, and those
of a key in several blocks of one launch, in any order. The first source contains every query's own key, so every query
has at least one key.

Forward and backward are a pair of plain functions with `Kept` between them, and one autograd function calls both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megalong.attention.kernels import BlockKernel, Gradients
from megalong.attention.mask import CAUSAL
from megalong.attention.merge import empty_result, merge
from megalong.attention.plan import AttentionPlan, Block
from megalong.attention.transport import Transport
from megalong.attention.varlen import Index, PackedBlocks, launches


class Kept(NamedTuple):
    """What forward saves for backward, besides its operands.

    Attributes:
        out: the result, `[s, b, h, d]` of q's type.
        lse: float32 `[b, h, s]`, log-sum-exp of the scores over the keys of all sources.
    """

    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class BlockwiseAttention:
    """Attention of one micro-batch, forward and backward: q `[s, b, h, d]`, k and v `[s, b, g, d]`, g divides h.

    Attributes:
        window: maximum number of keys per query, its own included; None: all earlier keys of its document.
        joined: how many context-parallel ranks the transport treats as one.
    """

    plan: AttentionPlan
    transport: Transport
    kernel: BlockKernel
    scale: float
    window: int | None = None
    joined: int = 1

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Kept:
        """Attend to the keys of all sources."""
        if self.is_one_block:
            return Kept(*self.kernel.forward(q, k, v, CAUSAL, self.scale))
        out, lse = empty_result(q, v.shape[-1])
        # Without a window each query is in one block of the first source, so there is nothing to merge with yet.
        fresh = self.window is None
        for source, (keys, values) in self.transport.pieces(torch.stack((k, v)), self.plan):
            for rows, launch in self._launches(source, q.device):
                new_out, new_lse = launch.forward(q[:, rows], keys[:, rows], values[:, rows], self)
                _accumulate(out[:, rows], lse[rows], launch.queries, new_out, new_lse, fresh)
            fresh = False
        return Kept(out.to(q.dtype), lse)

    def backward(
        self, grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept
    ) -> Gradients:
        """Gradients of q, k and v, in float32 if several blocks were summed."""
        out, lse = kept
        if self.is_one_block:
            return self.kernel.backward(grad_out, q, k, v, out, lse, CAUSAL, self.scale)
        grad_q = torch.zeros_like(q, dtype=torch.float32)

        def share(source: int | None, pair: torch.Tensor) -> Callable[[torch.Tensor], None]:
            keys, values = pair
            shares = []
            for rows, launch in self._launches(source, q.device):
                dq, dk, dv = launch.backward(
                    grad_out[:, rows], q[:, rows], keys[:, rows], values[:, rows], out[:, rows], lse[rows], self
                )
                grad_q[launch.queries, rows] += dq
                shares.append((launch.keys, rows, dk, dv))

            def add(total: torch.Tensor) -> None:
                for key_index, rows, dk, dv in shares:
                    _add(total[0][:, rows], key_index, dk)
                    _add(total[1][:, rows], key_index, dv)

            return add

        dk, dv = self.transport.gradient(torch.stack((k, v)), self.plan, share)
        return grad_q, dk, dv

    @property
    def is_one_block(self) -> bool:
        """Whether the whole computation is one causal block of this rank's own tokens."""
        if self.transport.size > 1:
            return False
        rows = self._blocks(0)
        return len(rows) == 1 and len(rows[0][1]) == 1 and rows[0][1][0].mask == CAUSAL

    def _launches(self, source: int | None, device: torch.device) -> Iterator[tuple[slice, _OneBlock | _Packed]]:
        """(rows of the batch, launch) against `source`'s keys, cached in the plan and shared by all layers.

        Indices are therefore built and uploaded once per micro-batch, in its first layer.
        """
        packs = self.kernel.varlen is not None
        key = ("launches", self.transport.rank, source, self.window, self.joined, device, packs)
        by_rows = self.plan.cached(
            key, lambda: [(rows, list(_launches(blocks, packs, device))) for rows, blocks in self._blocks(source)]
        )
        return ((rows, launch) for rows, launches in by_rows for launch in launches)

    def _blocks(self, source: int | None) -> list[tuple[slice, list[Block]]]:
        return self.plan.blocks(self.transport.rank, source, self.window, self.joined)


def blockwise_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: BlockwiseAttention
) -> torch.Tensor:
    """The result of `attention.forward`; differentiable once in q, k and v, by `attention.backward`."""
    out: torch.Tensor = _Blockwise.apply(q, k, v, attention)
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: BlockwiseAttention
    ) -> torch.Tensor:
        kept = attention.forward(q, k, v)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.attention = attention
        return kept.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.attention.backward(grad_out, q, k, v, Kept(out, lse))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _accumulate(
    out: torch.Tensor,
    lse: torch.Tensor,
    queries: Index,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    fresh: bool,
) -> None:
    if not fresh:
        old_out, old_lse = out[queries], lse[..., queries]
        merge(old_out, old_lse, new_out, new_lse)
        if isinstance(queries, slice):
            return  # views were merged in place
        new_out, new_lse = old_out, old_lse
    out[queries] = new_out.to(out.dtype)
    lse[..., queries] = new_lse


def _add(total: torch.Tensor, index: Index, share: torch.Tensor) -> None:
    if isinstance(index, slice):
        total[index] += share
    else:
        total.index_add_(0, index, share.to(total.dtype))  # a key may be in several blocks


def _launches(blocks: list[Block], packs: bool, device: torch.device) -> Iterator[_OneBlock | _Packed]:
    """`packs`: whether the kernel computes many blocks at once."""
    if not packs:
        yield from (_OneBlock(block) for block in blocks)
        return
    for launch in launches(blocks):
        yield _OneBlock(launch.blocks[0]) if len(launch.blocks) == 1 else _Packed(launch.on(device))


class _OneBlock:
    """One block, computed on views of the tensors."""

    def __init__(self, block: Block) -> None:
        self.queries, self.keys, self.mask = block.queries, block.keys, block.mask

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: BlockwiseAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attention.kernel.forward(q[self.queries], k[self.keys], v[self.keys], self.mask, attention.scale)

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        attention: BlockwiseAttention,
    ) -> Gradients:
        i, j = self.queries, self.keys
        return attention.kernel.backward(grad_out[i], q[i], k[j], v[j], out[i], lse[..., i], self.mask, attention.scale)


class _Packed:
    """Many blocks of one row of the batch, packed end to end into one launch."""

    def __init__(self, packed: PackedBlocks) -> None:
        self.packed = packed
        self.queries, self.keys = packed.queries, packed.keys

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: BlockwiseAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses = [], []
        for row in range(q.shape[1]):
            out, lse = _varlen(attention).forward(
                q[self.queries, row], k[self.keys, row], v[self.keys, row], self.packed, attention.scale
            )
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs, 1), torch.stack(lses)

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        attention: BlockwiseAttention,
    ) -> Gradients:
        i, j = self.queries, self.keys
        grads = [
            _varlen(attention).backward(
                grad_out[i, row], q[i, row], k[j, row], v[j, row], out[i, row], lse[row][:, i], self.packed,
                attention.scale,
            )
            for row in range(q.shape[1])
        ]  # fmt: skip
        dq, dk, dv = (torch.stack(parts, 1) for parts in zip(*grads, strict=True))
        return dq, dk, dv


def _varlen(attention: BlockwiseAttention) -> Any:
    assert attention.kernel.varlen is not None
    return attention.kernel.varlen
