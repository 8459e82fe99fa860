"""Groups are closed once, all of them, and in one order on all ranks."""

from __future__ import annotations

from itertools import pairwise

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
