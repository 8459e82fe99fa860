"""Many blocks in one launch of FlashAttention's variable-length kernel.

A pack of short documents is hundreds of small blocks. Launched one by one they would leave a GPU idle. The
variable-length kernel takes them packed end to end, with the offset of each:

    blocks   q [0, 3) k [0, 3)   q [3, 5) k [3, 5)          cumulative lengths  q 0 3 5   k 0 3 5

Blocks share a launch if no query is in two of them and if their diagonals are equal, counted from the bottom right
corner as in flash. Keys may be in several blocks. Tokens that are not contiguous are copied.

Indices and cumulative lengths are computed and uploaded once per micro-batch, not per layer and pass: the plan caches
the result of `Launch.on` (blockwise.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from megalong.attention import upload
from megalong.attention.limits import COUNTABLE, Gradients, by_heads
from megalong.attention.mask import BlockMask
from megalong.attention.plan import Block

Window = tuple[int, int]  # keys left and right of the diagonal through the bottom right corner, -1: all
Index = slice | torch.Tensor  # of tokens: consecutive ones, or int64 in any order

TILE = 128  # queries: flash leaves a gap of this size between sequences


@dataclass
class Launch:
    """Blocks for one launch, in the order of their queries; no query is in two of them."""

    window: Window
    blocks: list[Block] = field(default_factory=list)

    def on(self, device: torch.device) -> PackedBlocks:
        """This launch in the form that a kernel on `device` needs; uploads it."""
        queries, keys = ([getattr(block, side) for block in self.blocks] for side in ("queries", "keys"))
        lengths = [np.array([s.stop - s.start for s in slices]) for slices in (queries, keys)]
        q_bounds, k_bounds = (np.append(0, np.cumsum(each)).astype(np.int32) for each in lengths)
        assert all(each.sum() < COUNTABLE for each in lengths)
        bounds = upload.to_device(np.stack((q_bounds, k_bounds)), device)
        return PackedBlocks(
            self.window,
            _index(queries, device),
            _index(keys, device),
            bounds[0],
            bounds[1],
            int(lengths[0].max()),
            int(lengths[1].max()),
        )


@dataclass(frozen=True)
class PackedBlocks:
    """A launch on its device.

    `queries` and `keys`: which tokens are packed. `query_bounds` and `key_bounds`: int32, the first packed token of
    each block, and the end of the last. Nothing here depends on a layer, and nothing is modified later.
    """

    window: Window
    queries: Index
    keys: Index
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_queries: int
    longest_keys: int

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Arguments in the order of torch's flash operators."""
        return self.query_bounds, self.key_bounds, self.longest_queries, self.longest_keys


def _index(slices: list[slice], device: torch.device) -> Index:
    """All tokens of `slices`, end to end; as one slice, which needs no copy, if they are contiguous."""
    if all(one.stop == other.start for one, other in itertools.pairwise(slices)):
        return slice(slices[0].start, slices[-1].stop)
    return upload.to_device(np.concatenate([np.arange(s.start, s.stop) for s in slices]), device)


@dataclass(frozen=True)
class VarlenKernel:
    """`forward(q, k, v, packed, scale)` and `backward(grad_out, q, k, v, out, lse, packed, scale)` on packed tokens.

    q, grad_out and out `[n, h, d]`, k and v `[m, g, d]`, lse float32 `[h, n]`, with n and m tokens of all blocks, and
    packed a `PackedBlocks`.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., Gradients]


def launches(blocks: list[Block]) -> list[Launch]:
    """Launches by first fit; each block is in exactly one."""
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
    """A block's diagonals as flash's window."""
    queries, keys = (s.stop - s.start for s in (block.queries, block.keys))
    return to_corner(block.mask, queries, keys)


def to_corner(mask: BlockMask, queries: int, keys: int) -> Window:
    """(left, right) of `mask`.

    Every query must see a key: flash cannot express one that sees none. And with a bound to the left, flash reads "all
    to the right" as "as many as there are keys", which is less than all if queries outnumber keys.
    """
    corner = keys - queries
    left = -1 if mask.lower is None else corner - mask.lower
    right = -1 if mask.upper is None else mask.upper - corner
    assert mask.lower is None or left >= 0
    assert mask.upper is None or right >= 0
    assert mask.lower is None or mask.upper is not None or queries <= keys + 1
    return left, right


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedBlocks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `VarlenKernel`."""
    q, k, v = _readable(q, k, v)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *packed.bounds, 0.0, False, False, scale=scale, **window_arguments(packed.window)
    )
    return out, lse


def flash_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    packed: PackedBlocks,
    scale: float,
) -> Gradients:
    """See `VarlenKernel`."""
    gaps = TILE * len(packed.query_bounds)  # between sequences in the flash buffer that `by_heads` splits
    per_head = (packed.longest_queries + gaps) * rounded_head(q.shape[-1])
    return by_heads(functools.partial(_backward, packed, scale), grad_out, q, k, v, out, lse, per_head)


def _backward(
    packed: PackedBlocks,
    scale: float,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Gradients:
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *_readable(grad_out, q, k, v, out),
        lse.contiguous(),
        *packed.bounds,
        0.0,
        False,
        *no_random_state(q.device),
        scale=scale,
        **window_arguments(packed.window),
    )
    return dq, dk, dv


def _readable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def rounded_head(head_dim: int) -> int:
    """Channels with which flash computes a head."""
    step = 32 if head_dim <= 128 else 64
    return -(-head_dim // step) * step


def window_arguments(window: Window) -> dict[str, int]:
    """`window` as arguments of torch's flash operators."""
    return {"window_size_left": window[0], "window_size_right": window[1]}


def no_random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The dropout state that flash's backward takes as arguments; unused, because there is no dropout."""
    return torch.empty(2, dtype=torch.uint64, device=device), torch.empty((), dtype=torch.uint64, device=device)


FLASH_VARLEN = VarlenKernel(flash_forward, flash_backward)
