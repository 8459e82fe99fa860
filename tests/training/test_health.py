"""Stragglers among made-up ranks and a real slow one; goodput over lives that are killed, resumed and rolled back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalong.training.health import stragglers
from megalong.training.ledger import FILE, Ledger
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool


@pytest.mark.parametrize(
    ("seconds", "stages", "slow"),
    [
        ([1.0] * 8, [0] * 8, []),
        ([1.0, 1.01, 0.99, 1.02, 1.0, 1.8, 1.01, 0.98], [0] * 8, [5]),
        ([1.0, 2.0], [0, 0], [1]),
        ([1.0, 1.0, 2.0, 2.0], [0, 0, 1, 1], []),  # the last stage is slower by design
        ([1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.9], [0, 0, 1, 1, 0, 0, 1, 1], [7]),
        ([1.0, 1.3, 0.7, 1.4, 0.8, 1.6, 1.1, 0.6], [0] * 8, []),  # ranks that scatter have no straggler among them
        ([1.0], [0], []),
    ],
)
def test_stragglers_stand_out_of_their_stage(seconds, stages, slow):
    assert stragglers(seconds, stages) == slow


def test_goodput_takes_off_what_is_done_twice(tmp_path: Path) -> None:
    """Ten steps of 8 s in 100 s, killed; resumed from step 5 after an hour's wait, five steps again in 50 s."""
    first = Ledger(tmp_path, 0, started=1000.0, now=1010.0)
    for step in range(1, 11):
        first.add(step, useful=8.0, pause=0.5, skipped=0, now=1000.0 + 10 * step)
    first.write()
    assert first.goodput == pytest.approx(80 / 100)
    second = Ledger(tmp_path, 5, started=4700.0, now=4700.0)
    second.add(10, useful=40.0, pause=0.0, skipped=1, now=4750.0)
    assert second.goodput == pytest.approx((5 * 8 + 40) / (100 + 50))
    assert (second.restarts, second.waited, second.book.skipped, second.book.pauses) == (1, 3600.0, 1, 5.0)


def test_a_step_between_two_marks_counts_in_proportion(tmp_path: Path) -> None:
    first = Ledger(tmp_path, 0, started=0.0, now=0.0)
    first.add(10, useful=100.0, pause=0.0, skipped=0, now=100.0)
    first.write()
    assert Ledger(tmp_path, 4, started=200.0, now=200.0).book.marks == [[0, 0.0], [4, 40.0]]


def test_going_back_within_a_life_is_no_restart(tmp_path: Path) -> None:
    first = Ledger(tmp_path, 0, started=50.0, now=50.0)
    first.add(8, useful=80.0, pause=0.0, skipped=0, now=150.0)
    first.write()
    back = Ledger(tmp_path, 2, started=50.2, now=150.0)
    assert (back.restarts, back.goodput) == (0, pytest.approx(20 / 100))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lives": [[1]], "marks": [], "skipped": 0, "pauses": 0}'])
def test_a_torn_book_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    ledger = Ledger(tmp_path, 3, started=5.0, now=9.0)
    ledger.write()
    assert ledger.restarts == 0
    assert json.loads((tmp_path / FILE).read_text())["lives"] == [[5.0, 9.0]]


def test_a_rank_that_reads_slowly_is_named(pool: WorkerPool, tmp_path: Path) -> None:
    """Two replicas, the second held up for 0.2 s before each step's data: its steps are as long as the first one's."""
    settings = run_settings(
        tmp_path / "run", make_llama(tmp_path / "llama"), make_dataset(tmp_path / "data"), training={"train_iters": 6}
    )
    found = pool.run(2, "tests.training.workers:train_beside_slow_rank", settings, 1, 0.2)[0]
    assert found["scalars"]["slowest_rank"] == 1
    assert found["scalars"]["slowest_to_median"] > 1.25
    assert found["own_seconds"][1] > 0.2
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("straggler: rank 1 on ") == 1
    assert "health: goodput" in log
    book = json.loads((tmp_path / "run" / FILE).read_text())
    assert 0 < book["goodput"] <= 1
    assert [mark[0] for mark in book["marks"]] == [0, 1, 2, 3, 4, 5, 6]
