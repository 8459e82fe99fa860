"""Buckets against the documented examples and a plain numpy loop."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalong.evaluation.buckets import PositionLoss, bucket_edges, bucket_labels


def test_edges_follow_the_documented_rule():
    assert bucket_edges(4096) == [0, 64, 128, 256, 512, 1024, 2048, 4096]
    assert bucket_edges(131072) == [0, *(1024 * 2**i for i in range(8))]
    assert bucket_edges(5000)[-2:] == [4096, 5000]
    assert bucket_edges(64) == [0, 64]
    assert bucket_edges(1) == [0, 1]
    assert len(bucket_edges(4 * 1024 * 1024)) == 14
    with pytest.raises(ValueError, match="seq_length"):
        bucket_edges(0)


def test_labels_are_short():
    assert bucket_labels([0, 64, 1024, 5000, 1048576, 2097152]) == ["0-64", "64-1K", "1K-5000", "5000-1M", "1M-2M"]


def numpy_means(edges, losses, positions, mask):
    means = []
    for low, high in pairwise(edges):
        inside = (positions >= low) & (positions < high) & (mask > 0)
        means.append(float(losses[inside].mean()) if inside.any() else None)
    return means


def test_means_equal_a_plain_loop_over_several_batches():
    rng = np.random.default_rng(0)
    accumulator = PositionLoss(300)
    kept = []
    for _ in range(3):
        losses, mask = rng.gamma(2, size=(2, 100)), rng.integers(0, 2, (2, 100))
        positions = rng.permutation(300)[:100]
        accumulator.add(torch.tensor(losses), torch.tensor(positions), torch.tensor(mask))
        kept.append((losses, np.broadcast_to(positions, (2, 100)), mask))
    losses, positions, mask = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    assert accumulator.means() == pytest.approx(numpy_means(bucket_edges(300), losses, positions, mask), rel=1e-12)


def test_a_masked_nan_does_not_poison_and_empty_buckets_are_none():
    assert PositionLoss(256).means() == [None, None, None]
    accumulator = PositionLoss(256)
    accumulator.add(torch.tensor([[1.0, float("nan")]]), torch.tensor([3, 4]), torch.tensor([[1, 0]]))
    assert accumulator.means() == [1.0, None, None]


def test_positions_may_differ_by_row():
    accumulator = PositionLoss(128)
    accumulator.add(torch.tensor([[1.0], [3.0]]), torch.tensor([[0], [127]]))
    assert accumulator.means() == [1.0, 3.0]


def add_my_share():
    """Ranks 0 and 1 add every other token, rank 2 holds none."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    losses, positions = torch.rand(1, 200, dtype=torch.float64), torch.arange(200)
    accumulator = PositionLoss(200)
    if rank != 2:
        mine = slice(rank, None, 2)
        accumulator.add(losses[:, mine], positions[mine])
    accumulator.reduce(None)
    return accumulator.means()


def test_reduce_joins_the_shares_of_all_ranks(pool):
    torch.manual_seed(0)
    whole = PositionLoss(200)
    whole.add(torch.rand(1, 200, dtype=torch.float64), torch.arange(200))
    for means in pool.run(3, "tests.evaluation.test_buckets:add_my_share"):
        assert means == pytest.approx(whole.means(), rel=1e-12)
