"""Measure how fast nodes exchange tensors, so that a slow node can be identified.

An all-reduce over all ranks runs at the pace of the slowest rank, without showing which one that is. So each node is
measured alone (an all-reduce of its own GPUs: NVLink), and each node with its neighbours (rank i with rank i of the
next node, in both directions at once, in two rounds):

    round 0   n0↔n1  n2↔n3  …          round 1   n1↔n2  n3↔n4  …  (the last with n0 if there is an even number)

A node's network speed is the better of its two exchanges: the healthy neighbour of a bad node also has a healthy one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

_REPEATS = 3


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (1e9 bytes) of one rank: in its node's all-reduce, to its better neighbour, in the world's all-reduce.

    None if there was nothing to measure: one GPU per node, or one node.
    """

    inside: float | None
    between: float | None
    world: float | None


def measure(device: torch.device, per_node: int, megabytes: int) -> Bandwidth:
    """Measure; collective. The world must be initialized, with `per_node` ranks per node."""
    tensor = torch.zeros(megabytes * 250_000, dtype=torch.float32, device=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    node, nodes = rank // per_node, world // per_node
    inside = None
    groups = [dist.new_group(list(range(first, first + per_node))) for first in range(0, world, per_node)]
    if per_node > 1:
        inside = _all_reduce(tensor, groups[node], per_node)
    exchanges = [_exchange(tensor, node, nodes, per_node, turn) for turn in (0, 1)] if nodes > 1 else []
    between = max((speed for speed in exchanges if speed is not None), default=None)
    together = _all_reduce(tensor, dist.group.WORLD, world) if world > 1 else None
    for group in groups:
        dist.destroy_process_group(group)
    return Bandwidth(inside, between, together)


def neighbour(node: int, nodes: int, turn: int) -> int | None:
    """The node that exchanges with `node` in round `turn`, or None.

    >>> [neighbour(node, 4, 0) for node in range(4)], [neighbour(node, 4, 1) for node in range(4)]
    ([1, 0, 3, 2], [3, 2, 1, 0])
    """
    if turn == 0:
        other = node ^ 1
        return other if other < nodes else None
    other = node + 1 if node % 2 else node - 1
    if 0 <= other < nodes:
        return other
    return other % nodes if nodes % 2 == 0 else None


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, size: int) -> float:
    """GB/s that each rank sends: 2 (n - 1) / n of the tensor in the time of one all-reduce."""
    seconds = _best(tensor.device, group, lambda: dist.all_reduce(tensor, group=group))
    return 2 * (size - 1) / size * tensor.nbytes / seconds / 1e9


def _exchange(tensor: torch.Tensor, node: int, nodes: int, per_node: int, turn: int) -> float | None:
    other = neighbour(node, nodes, turn)
    if other is None:
        _best(tensor.device, None, lambda: None)
        return None
    peer = other * per_node + dist.get_rank() % per_node
    received = torch.empty_like(tensor)

    def both_ways() -> None:
        sends = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()

    return tensor.nbytes / _best(tensor.device, None, both_ways) / 1e9


def _best(device: torch.device, group: dist.ProcessGroup | None, action: object) -> float:
    """Seconds of the fastest repeat, after one warm-up, which opens the connections."""
    assert callable(action)
    best = float("inf")
    for repeat in range(_REPEATS + 1):
        dist.barrier(group)
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - started)
    return max(best, 1e-9)
