"""How fast nodes exchange tensors, in a way that tells a slow node from a slow network.

One all-reduce over everybody runs at the pace of its slowest member, and names nobody. So each node is measured alone
(an all-reduce of its own GPUs: NVLink), and each node with its neighbours (rank i with rank i of the next node, both
ways at once, in two rounds):

    round 0   n0↔n1  n2↔n3  …          round 1   n1↔n2  n3↔n4  …  (the last with n0, where their number is even)

A node's network is as good as the better of its two exchanges: a healthy neighbour of a bad node has another one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

_REPEATS = 3


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (1e9 bytes) of one rank: of its node's all-reduce, to its better neighbour, of the whole world.

    None where there was nothing to measure: one GPU a node, or one node.
    """

    inside: float | None
    between: float | None
    world: float | None


def measure(device: torch.device, per_node: int, megabytes: int) -> Bandwidth:
    """Measure on every rank at once, in an initialised world of nodes of `per_node` ranks."""
    tensor = torch.zeros(megabytes * 250_000, dtype=torch.float32, device=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    node, nodes = rank // per_node, world // per_node
    inside = None
    groups = [dist.new_group(list(range(first, first + per_node))) for first in range(0, world, per_node)]
    if per_node > 1:
        inside = _all_reduce(tensor, groups[node], per_node)
    exchanges = [_exchange(tensor, node, nodes, per_node, turn) for turn in (0, 1)] if nodes > 1 else []
    between = max((speed for speed in exchanges if speed is not None), default=None)
    everybody = _all_reduce(tensor, dist.group.WORLD, world) if world > 1 else None
    for group in groups:
        dist.destroy_process_group(group)
    return Bandwidth(inside, between, everybody)


def neighbour(node: int, nodes: int, turn: int) -> int | None:
    """The node that `node` exchanges with in round `turn`, None for none.

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
    """Bytes each rank sends a second: 2 (n - 1) / n of the tensor."""
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
    """Seconds of the fastest repeat after one to warm up (connections are made by the first)."""
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
