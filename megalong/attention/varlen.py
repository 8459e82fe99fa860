"""Many blocks in one launch of FlashAttention's variable-length kernel.

A pack of short documents is hundreds of small blocks. Launched one by one they would leave a GPU idle; the
variable-length kernel takes them laid end to end, with the token at which each begins:

    blocks   q [0, 3) k [0, 3)   q [3, 5) k [3, 5)          cumulative lengths  q 0 3 5   k 0 3 5

Blocks share a launch if no query is in two of them and their diagonals are the same counted from the bottom right
corner, which is how flash counts. Keys may be in several; they are copied then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megalong.attention.mask import BlockMask
from megalong.attention.plan import Block

Window = tuple[int, int]  # keys left and right of the diagonal through the bottom right corner, -1: all


@dataclass
class Launch:
    """Blocks that go together: in the order of their queries, none of which is in two of them."""

    window: Window
    blocks: list[Block] = field(default_factory=list)

    def queries(self, device: torch.device) -> torch.Tensor:
        """Indices of all queries, end to end."""
        return _indices([block.queries for block in self.blocks], device)

    def keys(self, device: torch.device) -> torch.Tensor:
        """Indices of all keys, end to end."""
        return _indices([block.keys for block in self.blocks], device)

    def bounds(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """(cumulative lengths of queries and of keys, int32 from 0; the longest of each)."""
        lengths = [
            torch.tensor([0, *(s.stop - s.start for s in slices)], dtype=torch.int32)
            for slices in ([block.queries for block in self.blocks], [block.keys for block in self.blocks])
        ]
        q, k = (torch.cumsum(one, 0, dtype=torch.int32).to(device) for one in lengths)
        return q, k, int(lengths[0].max()), int(lengths[1].max())


@dataclass(frozen=True)
class VarlenKernel:
    """`forward(q, k, v, launch, scale)` and `backward(grad_out, q, k, v, out, lse, launch, scale)` on packed tokens.

    q, grad_out and out `[n, h, d]`, k and v `[m, g, d]`, lse float32 `[h, n]`, with n and m tokens of all blocks.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def launches(blocks: list[Block]) -> list[Launch]:
    """As few launches as a first fit finds; each block in exactly one."""
    found: list[Launch] = []
    for block in sorted(blocks, key=lambda block: block.queries.start):
        window = corner_window(block)
        for launch in found:
            if launch.window == window and launch.blocks[-1].queries.stop <= block.queries.start:
                launch.blocks.append(block)
                break
        else:
            found.append(Launch(window, [block]))
    return found


def corner_window(block: Block) -> Window:
    """A block's diagonals in flash's words."""
    queries, keys = (s.stop - s.start for s in (block.queries, block.keys))
    return to_corner(block.mask, queries, keys)


def to_corner(mask: BlockMask, queries: int, keys: int) -> Window:
    """(left, right) of `mask`.

    Every query must see a key: flash has no word for one that sees none. And flash takes "all to the right" beside a
    bound to the left as "as many as there are keys", which is less than all if queries outnumber keys.
    """
    corner = keys - queries
    left = -1 if mask.lower is None else corner - mask.lower
    right = -1 if mask.upper is None else mask.upper - corner
    assert mask.lower is None or left >= 0
    assert mask.upper is None or right >= 0
    assert mask.lower is None or mask.upper is not None or queries <= keys + 1
    return left, right


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: Launch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `VarlenKernel`."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *launch.bounds(q.device), 0.0, False, False, scale=scale, **window_arguments(launch.window)
    )
    return out, lse


def flash_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    launch: Launch,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `VarlenKernel`."""
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        *launch.bounds(q.device),
        0.0,
        False,
        *no_random_state(q.device),
        scale=scale,
        **window_arguments(launch.window),
    )
    return dq, dk, dv


def window_arguments(window: Window) -> dict[str, int]:
    """How torch's flash operators are told of it."""
    return {"window_size_left": window[0], "window_size_right": window[1]}


def no_random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What flash's backward wants to know of dropout, which there is none of."""
    return (
        torch.zeros(2, dtype=torch.uint64, device=device),
        torch.zeros((), dtype=torch.uint64, device=device),
    )


def _indices(slices: list[slice], device: torch.device) -> torch.Tensor:
    parts: list[Any] = [torch.arange(s.start, s.stop, device=device) for s in slices]
    return torch.cat(parts)


FLASH_VARLEN = VarlenKernel(flash_forward, flash_backward)
