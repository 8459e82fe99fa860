"""Groups wait as long as the world, and are closed once, all of them, and in one order on all ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megalong.runtime import distributed
from tests.pool import WorkerPool


def test_a_layout_with_gloo_groups_is_closed_once_and_in_one_order(pool: WorkerPool) -> None:
    closed = pool.run(2, "tests.runtime.workers:close_layouts_of_a_gpu_world")
    for one in closed:
        assert len(set(one)) == len(one)
        assert one[-2:] == ["left open: 0", "the world"]
        # Names count groups, the same on all ranks. Megatron-Core closes its three gloo groups by itself, before ours.
        numbers = [int(name) for name in one[:-2]]
        assert sum(later > earlier for earlier, later in pairwise(numbers)) <= 2 * 3
    shared = set(closed[0]) & set(closed[1])
    assert len(shared) > 10
    assert len({tuple(name for name in one if name in shared) for one in closed}) == 1


def test_a_process_takes_its_device_before_anything_can_open_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is imported by `prepare`; NCCL joins with the group."""
    order: list[object] = []
    monkeypatch.setattr(distributed.gpus, "use", order.append)
    monkeypatch.setattr(distributed.megatron, "prepare", lambda device: order.append("prepare"))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: order.append("join"))
    monkeypatch.delenv("RANK", raising=False)
    distributed.start(torch.device("cuda", 1))
    assert order == [torch.device("cuda", 1), "prepare", "join"]


def test_every_group_waits_as_long_as_the_world(pool: WorkerPool) -> None:
    """gloo's own would be 30 minutes, NCCL's 10: too short for a step of hours, too long for a link that is cut."""
    (found,) = pool.run(1, "tests.runtime.workers:timeouts_of_a_gpu_world", 7)
    groups = dict(found)
    assert {"control", "background", "DATA_PARALLEL_GROUP_GLOO"} <= set(groups)
    assert len(groups) > 10
    # Megatron-Core leaves it to gloo, and without experts nobody talks over it.
    del groups["EXPERT_DATA_PARALLEL_GROUP_GLOO"]
    assert set(groups.values()) == {7.0}
