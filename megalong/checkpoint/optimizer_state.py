"""The distributed optimizer's state, saved as each rank holds it and loaded under any layout.

Megatron-Core's distributed optimizer gives every data-parallel rank a range of each flattened parameter: of a weight
[4, 5], say, elements 3 to 16. A range is a few boxes of the parameter:

    . . . a a        a    row 0, columns 3 and 4    [1, 2]
    b b b b b        b    rows 1 and 2              [2, 5]
    b b b b b
    c c . . .        c    row 3, columns 0 and 1    [1, 2]

A box of a rank's shard is also a box of the whole parameter, because a tensor-parallel shard is one. So a rank saves
views of its own memory, each with its offset in the whole tensor; nothing is gathered or copied. To load, a rank asks
for the boxes of its own layout, and torch reads what overlaps them directly into the optimizer's tensors.

Names and shapes on disk are those of Megatron-Core's `fully_reshardable`, which gathers whole parameters first; only
the pieces are cut differently. Each implementation reads what the other wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

FORM = "fully_reshardable"
_MASTER = "param"  # what Megatron-Core calls the fp32 values that a moment belongs to

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """(offset, size) of the boxes of a tensor that contain its elements `start` … `stop - 1` in row-major order.

    The boxes are in that order, and the elements of each are contiguous: `boxes((4, 5), 3, 17)` gives ((0, 3), (1, 2)),
    ((1, 0), (2, 5)) and ((3, 0), (1, 2)).
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows: first … last - 1
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    begin = index * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - begin, stop - begin):
        yield (index, *offset), (1, *size)


@dataclass(frozen=True)
class OptimizerState:
    """The tensors of a rank's optimizer, ready to be saved or to be loaded into.

    Attributes:
        shards: for Megatron-Core to save or to fill.
        late: (target, source) of what `finish` copies.
    """

    shards: dict[str, ShardedTensor]
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def finish(self) -> None:
        """After model and optimizer are loaded, fill the fp32 masters that share memory with the model's weights."""
        with torch.no_grad():
            for target, source in self.late:
                target.copy_(source)


def optimizer_state(optimizer: DistributedOptimizer, model: dict[str, Any], loading: bool = False) -> OptimizerState:
    """Every box of this rank's fp32 masters and moments.

    Args:
        model: the sharded state of the optimizer's model, which says where each parameter belongs.
        loading: give masters that share memory with a weight their own memory. Weights and masters are read in any
            order, and if the checkpoint's weights are bf16, the fp32 master must be the one that stays.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model)
    stored = {one.data: one for one in nested_values(sharded)}
    found: list[ShardedTensor] = []
    late = []
    for parameter in optimizer.model_param_gbuf_map:
        mine = optimizer._get_model_param_range_map(parameter)["param"]
        for name, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items():
            if name == "step":
                continue  # stored with the parameter groups
            values = tensor.detach()
            if loading and name == _MASTER and _share_memory(values, parameter):
                values = torch.empty_like(values)
                late.append((tensor.detach(), values))
            found += _shards(stored[parameter], name, values, (mine.start, mine.end), optimizer)
    return OptimizerState({str(index): shard for index, shard in enumerate(found)}, late)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _shards(
    stored: ShardedTensor | ShardedTensorFactory,
    name: str,
    values: torch.Tensor,
    mine: tuple[int, int],
    optimizer: DistributedOptimizer,
) -> Iterator[ShardedTensor]:
    """`values` [elements of `mine`] of the parameter that is stored as `stored`, as shards named `name`."""
    pieces, taken = _pieces(stored), 0
    for box in boxes(tuple(stored.data.shape), *mine):
        length = math.prod(box[1])
        block = values[taken : taken + length].view(box[1])
        taken += length
        for piece in pieces:
            common = _intersection(box, (piece.offset, tuple(piece.stored.local_shape)))
            if common is not None:
                yield _shard(piece, name, block, box, common, optimizer.distributed_optimizer_instance_id)


@dataclass(frozen=True)
class _Piece:
    """A box of a rank's parameter that is stored as a tensor or a part of one; `offset` is in the rank's parameter."""

    offset: tuple[int, ...]
    stored: ShardedTensor


def _pieces(stored: ShardedTensor | ShardedTensorFactory) -> list[_Piece]:
    """The pieces that a rank's parameter is stored as: itself, or gate and up projection if Megatron-Core splits it."""
    if isinstance(stored, ShardedTensor):
        return [_Piece((0,) * stored.data.dim(), stored)]
    whole = torch.empty(stored.data.shape, device="meta")
    found = []
    for part in nested_values(replace(stored, data=whole).build()):
        if part.data._base is not whole or part.data.stride() != whole.stride():
            raise NotImplementedError(f"{part.key}: not stored as a part of the parameter")
        offset, rest = [], part.data.storage_offset()
        for stride in whole.stride():
            offset.append(rest // stride)
            rest %= stride
        found.append(_Piece(tuple(offset), part))
    return found


def _intersection(one: Box, other: Box) -> Box | None:
    begin = tuple(map(max, one[0], other[0]))
    ends = (a + b for a, b in zip(one[0], one[1], strict=True)), (a + b for a, b in zip(*other, strict=True))
    size = tuple(min(a, b) - first for a, b, first in zip(*ends, begin, strict=True))
    return (begin, size) if all(length > 0 for length in size) else None


def _shard(piece: _Piece, name: str, block: torch.Tensor, box: Box, common: Box, instance: int) -> ShardedTensor:
    """The part `common` of a `block`, which is the `box` of a parameter."""
    stored, (begin, size) = piece.stored, common
    for dim, (first, origin, length) in enumerate(zip(begin, box[0], size, strict=True)):
        block = block.narrow(dim, first - origin, length)
    layers = stored.prepend_axis_num  # a stack of layers is stored as one tensor
    place = (a - b + c for a, b, c in zip(begin, piece.offset, stored.global_offset[layers:], strict=True))
    return ShardedTensor(
        key=f"optimizer.state.{name}.{stored.key}",
        data=block[(None,) * layers],
        dtype=block.dtype,
        local_shape=(1,) * layers + size,
        global_shape=stored.global_shape,
        global_offset=(*stored.global_offset[:layers], *place),
        axis_fragmentations=None,  # no regular grid
        # Data-parallel ranks hold different ranges; tensor-parallel ranks and both ends of a pipeline may hold copies.
        replica_id=(*stored.replica_id[:2], instance),
        allow_shape_mismatch=stored.allow_shape_mismatch,
    )
