"""Loaders: what is read ahead, by whichever loader, under whichever layout, is what whole samples would have given.

The reference (`whole_samples.py`) reads whole samples and indexes them token by token.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalong.batches import dali
from megalong.batches.order import SampleOrder
from megalong.batches.prefetcher import Prefetcher
from megalong.errors import UserError
from tests.llama import make_dataset, run_settings
from tests.pool import WorkerPool

EACH = "tests.batches.workers:against_each"
DIGESTS = "tests.batches.workers:digests_of_each"
SEEN = "tests.batches.workers:tokens_seen"
LENGTH = 512


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("loader") / "data")


def settings(data: Path, folder: Path, context: int = 1, pipeline: int = 1, **others: Any) -> dict[str, Any]:
    """`others`: `layout`, `micro` (samples of a micro-batch), and keys of `data`."""
    tree = run_settings(folder, folder, data)
    tree["parallel"] = {"context_parallel_size": context, "pipeline_model_parallel_size": pipeline}
    tree["attention"] = {"layout": others.pop("layout", "auto")}
    tree["training"].update(micro_batch_size=others.pop("micro", 1))
    tree["data"] = {**tree["data"], "seq_length": LENGTH, "prefetch": 0, **others}
    return tree


CONTEXT_PARALLEL = {
    "zigzag naive": {},
    "zigzag naive, padded": {"seq_length": 509, "micro": 2},
    "zigzag masked": {"packing": "masked", "layout": "zigzag"},
    "per document": {"packing": "masked", "layout": "per_document_zigzag", "micro": 2},
    "balanced": {"packing": "masked", "layout": "balanced"},
    "balanced, padded": {"packing": "best_fit", "layout": "balanced", "seq_length": 507, "micro": 2},
    "nearly nothing": {"packing": "masked", "layout": "zigzag", "seq_length": 1},
}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_context_parallel_rank_reads_its_own_tokens_only(
    ranks: int, data: Path, tmp_path: Path, pool: WorkerPool
) -> None:
    many = [settings(data, tmp_path, ranks, **dict(one)) for one in CONTEXT_PARALLEL.values()]
    found = pool.run(ranks, EACH, many, 1)
    for rank in found:
        for name, one in zip(CONTEXT_PARALLEL, rank, strict=True):
            assert one["different"] == [], name
            # What the datasets were asked for is what is told, but for a sample's own padding.
            padding = one["read"] - one["gathered"]
            assert padding == 0 if "padded" not in name else 0 <= padding < 100, name
    shares = {name: found[0][n]["read"] / found[0][n]["whole"] for n, name in enumerate(CONTEXT_PARALLEL)}
    assert shares["zigzag naive"] == pytest.approx(1 / ranks, abs=0.005)
    # Masked ranks hold more runs, and read one token more for each.
    assert max(shares["balanced"], shares["per document"]) < 1 / ranks + 0.1


def test_a_middle_pipeline_stage_reads_none(data: Path, tmp_path: Path, pool: WorkerPool) -> None:
    """The first and the last read whole samples here; between them there are bounds and positions all the same."""
    many = [settings(data, tmp_path, pipeline=3, micro=2, packing=packing) for packing in ("naive", "masked")]
    first, middle, last = pool.run(3, EACH, many, 1)
    for one in (*first, *middle, *last):
        assert one["different"] == []
    assert [one["read"] for one in (*first, *last)] == [one["whole"] for one in (*first, *last)]
    assert [(one["read"], one["gathered"]) for one in middle] == [(0, 0), (0, 0)]


SHAPE = {"packing": "masked", "layout": "balanced", "micro": 2}  # shares are ragged
TORCH = [{"prefetch": 0}, {"prefetch": 1}, {"prefetch": 3, "workers": 4}]
DALI = [{"loader": "dali", "prefetch": 0}, {"loader": "dali", "prefetch": 2, "workers": 3}]


def killed_at(stops: list[int]) -> list[tuple[int, int]]:
    """(consumed samples, steps) of every life of a run of nine steps."""
    return [(4 * first, last - first) for first, last in zip([0, *stops], [*stops, 9], strict=True)]


def test_any_number_of_workers_gives_the_same_batches_wherever_it_starts(
    data: Path, tmp_path: Path, pool: WorkerPool
) -> None:
    """Killed at random steps, and read without a background, one step ahead, and by four threads."""
    unbroken = pool.run(2, DIGESTS, [settings(data, tmp_path, 2, **SHAPE)], [(0, 9)])
    visits = killed_at(sorted(random.Random(7).sample(range(1, 9), 3)))
    found = pool.run(2, DIGESTS, [settings(data, tmp_path, 2, **SHAPE, **one) for one in TORCH], visits)
    for rank in range(2):
        (expected,) = unbroken[rank]
        assert len({digest for _, digest in expected}) == 9
        assert found[rank] == [expected] * 3


@pytest.mark.slow
def test_dali_goes_on_where_torch_stopped(data: Path, tmp_path: Path, pool: WorkerPool) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    loaders = [settings(data, tmp_path, **SHAPE), settings(data, tmp_path, **SHAPE, **DALI[0])]
    torch_reads, dali_reads = pool.run(1, DIGESTS, loaders, [(12, 6)])[0]
    assert len({digest for _, digest in torch_reads}) == 6
    assert dali_reads == torch_reads


@pytest.mark.slow
def test_dali_gives_the_same_batches_with_any_number_of_workers(data: Path, tmp_path: Path, pool: WorkerPool) -> None:
    """Killed and resumed, with as many processes as there are threads above, on two context-parallel ranks."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    unbroken = pool.run(2, DIGESTS, [settings(data, tmp_path, 2, **SHAPE)], [(0, 9)])
    through_dali = [settings(data, tmp_path, 2, **SHAPE, **one) for one in DALI]
    found = pool.run(2, DIGESTS, through_dali, killed_at([4]), timeout=280)
    for rank in range(2):
        assert found[rank] == [unbroken[rank][0]] * 2


def test_a_resume_under_another_layout_goes_on_with_the_same_samples(
    data: Path, tmp_path: Path, pool: WorkerPool
) -> None:
    """Two steps of one process, one of two replicas, one of two context-parallel ranks: what one process would see."""
    (unbroken,) = pool.run(1, SEEN, settings(data, tmp_path), 0, 4)
    visits = [(1, 1, 0, 2), (2, 1, 8, 1), (2, 2, 12, 1)]  # world, context parallel, consumed samples, steps
    rows: dict[int, list[Any]] = {}
    for world, context, consumed, steps in visits:
        for rank in pool.run(world, SEEN, settings(data, tmp_path, context, prefetch=2, workers=2), consumed, steps):
            for k, _, tokens in rank:
                rows.setdefault(k, []).extend(tokens)
    assert sorted(rows) == list(range(16))
    for k, _, expected in unbroken:
        assert sorted(rows[k]) == expected


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_a_global_batch(replicas: int) -> None:
    orders = [SampleOrder(24, 8, 2, replica, replicas) for replica in range(replicas)]
    for t in range(3):
        numbers = [k for order in orders for i in range(order.count) for k in order.samples(t * order.count + i)]
        assert sorted(numbers) == list(range(24 + 8 * t, 32 + 8 * t))


def test_held_out_batches_come_again() -> None:
    order = SampleOrder(0, 8, 4, period=3)
    assert [order.samples(i)[0] for i in range(8)] == [0, 4, 8, 12, 16, 20, 0, 4]


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_what_fails_in_the_background_fails_where_it_is_asked_for(depth: int) -> None:
    def make(i: int) -> int:
        if i == 3:
            raise UserError("sample 3 is gone")
        return i

    ahead = Prefetcher(make, depth, workers=2)
    assert [ahead.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="sample 3 is gone"):
        ahead.next()
    ahead.close()


def numbers_source() -> int:
    return 100


def read_number(source: Any, k: int) -> np.ndarray:
    return np.full(4, source + k, np.int32)


@pytest.mark.slow
def test_dali_stays_off_the_gpu_and_a_batch_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to a GPU that is still queued must find the batch that it was queued for."""
    nvidia = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    define, devices = nvidia.pipeline_def, []

    def noting(function: Any) -> Any:
        def build(**settings: Any) -> Any:
            devices.append(settings["device_id"])
            return define(function)(**settings)

        return build

    monkeypatch.setattr(nvidia, "pipeline_def", noting)
    tokens = dali.DaliTokens(dali.Reader(numbers_source, read_number, SampleOrder(0, 2, 2)), 2, 1, 1)
    batches = [tokens.next() for _ in range(5)]
    tokens.close()
    assert devices == [None]
    for i, batch in enumerate(batches):
        assert [row.view(torch.int32).tolist() for row in batch] == [[100 + 2 * i] * 4, [101 + 2 * i] * 4]
        assert all(not row.is_cuda for row in batch)


def test_a_missing_dali_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data.loader: dali .*pip install megalong\[dali\].*data.loader: torch"):
        dali.check_installed()


def test_pieces_are_gathered_in_any_type(data: Path) -> None:
    from megalong.data.indexed import IndexedDataset

    dataset = IndexedDataset(data)
    starts, lengths = np.array([700, 3, 50, 3]), np.array([5, 0, 100, 9])
    expected = np.concatenate([dataset.read(s, n) for s, n in zip(starts, lengths, strict=True)])
    for kind in (dataset.dtype, np.int32, np.int64):
        out = np.empty(114, kind)
        dataset.gather(starts, lengths, out)
        np.testing.assert_array_equal(out, expected)
