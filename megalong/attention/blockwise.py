"""Attention of a rank's queries to keys that arrive source by source, merged by log-sum-exp.

    for each source of keys:   blocks of the plan  →  kernel  →  merged into (out, lse)
    backward, the same again:  kernel with the merged out and lse  →  shares of the gradients, added in float32

A transport (transport.py) supplies the keys. The order of sources and blocks is fixed, so
the same run gives the same bits (on a GPU only under `torch.use_deterministic_algorithms`: otherwise flash's gradients
of queries, and those of a key in several blocks of one launch, are summed in any order). The first source shows every
query its own key, so every query has at least one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megalong.attention.kernels import BlockKernel, Gradients
from megalong.attention.mask import CAUSAL
from megalong.attention.merge import empty_result, merge
from megalong.attention.plan import AttentionPlan, Block
from megalong.attention.transport import Transport
from megalong.attention.varlen import Index, PackedBlocks, launches


@dataclass(frozen=True)
class Attention:
    """How one call is computed.

    `window`: maximum keys per query, its own included; None: all earlier ones in its document. `joined`: how many
    context-parallel ranks the transport treats as one.
    """

    plan: AttentionPlan
    transport: Transport
    kernel: BlockKernel
    scale: float
    window: int | None = None
    joined: int = 1

    def parts(self, source: int | None, device: torch.device) -> list[tuple[slice, list[_OneBlock | _Packed]]]:
        """(rows of the batch, launches) against `source`'s keys, cached in the plan and shared by all layers.

        Indices are therefore built and uploaded once per micro-batch, in its first layer.
        """
        packs = self.kernel.varlen is not None
        key = ("parts", self.transport.rank, source, self.window, self.joined, device, packs)
        return self.plan.kept(
            key, lambda: [(rows, list(_parts(blocks, packs, device))) for rows, blocks in self._blocks(source)]
        )

    @property
    def is_one_block(self) -> bool:
        """Whether the whole computation is one causal block of this rank's own tokens."""
        if self.transport.size > 1:
            return False
        rows = self._blocks(0)
        return len(rows) == 1 and len(rows[0][1]) == 1 and rows[0][1][0].mask == CAUSAL

    def _blocks(self, source: int | None) -> list[tuple[slice, list[Block]]]:
        return self.plan.blocks(self.transport.rank, source, self.window, self.joined)


def blockwise_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Attend: q `[s, b, h, d]`, k and v `[s, b, g, d]`, result like q. Differentiable once in q, k and v."""
    out: torch.Tensor = _Blockwise.apply(q, k, v, attention)
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        out, lse = _forward(q, k, v, attention)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention = attention
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward(grad_out, q, k, v, out, lse, ctx.attention)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result of q's type and float32 log-sum-exp `[b, h, s]`, over the keys of all sources."""
    if attention.is_one_block:
        return attention.kernel.forward(q, k, v, CAUSAL, attention.scale)
    out, lse = empty_result(q, v.shape[-1])
    # Without a window the blocks of the first source hold every query once: there is nothing to merge with yet.
    fresh = attention.window is None
    for source, (keys, values) in attention.transport.sources(torch.stack((k, v)), attention.plan):
        for rows, parts in attention.parts(source, q.device):
            for part in parts:
                new_out, new_lse = part.forward(q[:, rows], keys[:, rows], values[:, rows], attention)
                _accumulate(out[:, rows], lse[rows], part.queries, new_out, new_lse, fresh)
        fresh = False
    return out.to(q.dtype), lse


def _accumulate(
    out: torch.Tensor,
    lse: torch.Tensor,
    queries: Index,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    fresh: bool,
) -> None:
    if not fresh:
        so_far, lse_so_far = out[queries], lse[..., queries]
        merge(so_far, lse_so_far, new_out, new_lse)
        if isinstance(queries, slice):
            return  # they were views, merged in place
        new_out, new_lse = so_far, lse_so_far
    out[queries] = new_out.to(out.dtype)
    lse[..., queries] = new_lse


def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attention: Attention,
) -> Gradients:
    """Gradients of q, k and v; float32 if several blocks were summed."""
    if attention.is_one_block:
        return attention.kernel.backward(grad_out, q, k, v, out, lse, CAUSAL, attention.scale)
    transport = attention.transport
    grad_q = torch.zeros_like(q, dtype=torch.float32)
    for source, (keys, values) in transport.sources(torch.stack((k, v)), attention.plan, backward=True):
        shares = []
        for rows, parts in attention.parts(source, q.device):
            for part in parts:
                dq, dk, dv = part.backward(
                    grad_out[:, rows], q[:, rows], keys[:, rows], values[:, rows], out[:, rows], lse[rows], attention
                )
                grad_q[part.queries, rows] += dq
                shares.append((part.keys, rows, dk, dv))
        # Wait as late as possible: the previous rank's gradient may still be in flight.
        grad_pair = transport.gradient()
        for key_index, rows, dk, dv in shares:
            _add(grad_pair[0][:, rows], key_index, dk)
            _add(grad_pair[1][:, rows], key_index, dv)
        transport.done()
    dk, dv = transport.collect()
    return grad_q, dk, dv


def _add(total: torch.Tensor, index: Index, share: torch.Tensor) -> None:
    if isinstance(index, slice):
        total[index] += share
    else:
        total.index_add_(0, index, share.to(total.dtype))  # a key may be in several blocks


def _parts(blocks: list[Block], packs: bool, device: torch.device) -> Iterator[_OneBlock | _Packed]:
    """`packs`: whether the kernel takes many blocks at once."""
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
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention
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
        attention: Attention,
    ) -> Gradients:
        i, j = self.queries, self.keys
        return attention.kernel.backward(grad_out[i], q[i], k[j], v[j], out[i], lse[..., i], self.mask, attention.scale)


class _Packed:
    """Many blocks of one row of the batch in one launch, laid end to end."""

    def __init__(self, packed: PackedBlocks) -> None:
        self.packed = packed
        self.queries, self.keys = packed.queries, packed.keys

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention
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
        attention: Attention,
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


def _varlen(attention: Attention) -> Any:
    assert attention.kernel.varlen is not None
    return attention.kernel.varlen
