"""The pool runs functions on ranks, reports their failures, and survives them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankError, WorkerPool

HERE = "tests.test_pool"


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """A pool of its own, so that killing its workers costs no other test a start-up."""
    with WorkerPool(2) as workers:
        yield workers


def add_ranks(offset: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return os.getpid(), total, torch.get_num_threads()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("broken on purpose")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang() -> None:
    time.sleep(60)


def test_results_arrive_in_rank_order_and_processes_are_reused(own_pool: WorkerPool) -> None:
    first = own_pool.run(2, f"{HERE}:add_ranks", torch.tensor([10, 20]))
    second = own_pool.run(2, f"{HERE}:add_ranks", torch.tensor([0, 0]))
    assert [pid for pid, *_ in first] == [pid for pid, *_ in second]
    assert first[0][0] != first[1][0] != os.getpid()
    assert all(torch.equal(total, torch.tensor([21, 41])) and threads == 1 for _, total, threads in first)


def test_a_smaller_world_uses_the_first_workers(own_pool: WorkerPool) -> None:
    pid, total, _ = own_pool.run(1, f"{HERE}:add_ranks", torch.tensor([5]))[0]
    assert total.item() == 5
    assert pid == own_pool.run(2, f"{HERE}:add_ranks", torch.tensor([5]))[0][0]


def test_a_rank_that_raises_is_named_with_its_traceback(own_pool: WorkerPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*fail_on_rank_one.*broken on purpose"):
        own_pool.run(2, f"{HERE}:fail_on_rank_one")
    assert own_pool.run(2, f"{HERE}:add_ranks", torch.tensor([1]))[1][1].item() == 3


def test_a_rank_that_dies_or_hangs_does_not_block_the_pool(own_pool: WorkerPool) -> None:
    with pytest.raises(RankError, match="exit code 7"):
        own_pool.run(2, f"{HERE}:die_on_rank_one")
    assert own_pool.run(1, f"{HERE}:add_ranks", torch.tensor([4]))[0][1].item() == 4
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)no answer within.*rank 0 stood at.* in hang"):
        own_pool.run(1, f"{HERE}:hang", timeout=2.0)
    assert time.monotonic() - begin < 30
    assert own_pool.run(1, f"{HERE}:add_ranks", torch.tensor([4]))[0][1].item() == 4


def test_a_world_larger_than_the_pool_is_refused(own_pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="1 to 2 workers"):
        own_pool.run(3, f"{HERE}:hang")


def test_no_store_file_is_left_behind(own_pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own_pool.run(2, f"{HERE}:add_ranks", torch.tensor([1]))
    assert list(tmp_path.iterdir()) == []
