"""Work shared among processes: in order, bounded, and ended whatever happens."""

import os
import time
from collections.abc import Iterator

import pytest

from megalong.data.workers import CHUNKS_UNDER_WAY, in_background, map_in_order
from megalong.errors import UserError


def uneven(number: int) -> int:
    """Every fourth item takes long, so that results come out of order."""
    time.sleep(0.03 if number % 4 == 0 else 0)
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_reading_stays_a_window_ahead(workers: int) -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(30):
            read.append(number)
            yield number

    taken = 0
    for number, square in map_in_order(uneven, items(), workers):
        assert (number, square) == (taken, taken * taken)
        assert len(read) <= taken + workers * CHUNKS_UNDER_WAY
        taken += 1
    assert taken == 30


def test_nothing_to_do() -> None:
    assert list(map_in_order(uneven, [], 2)) == []


def test_large_items_and_results_do_not_block_each_other() -> None:
    items = [bytes([number]) * 3_000_000 for number in range(12)]
    assert [result for _, result in map_in_order(lambda item: item * 2, items, 3)] == [item * 2 for item in items]


def test_the_first_mistake_in_order_is_told() -> None:
    def items() -> Iterator[int]:
        yield from range(6)
        raise UserError("in reading, after item 5")

    def wrong(number: int) -> int:
        time.sleep(0.05 * (5 - number))
        if number >= 3:
            raise UserError(f"in item {number}")
        return number

    done = []
    with pytest.raises(UserError, match="in item 3"):
        done.extend(map_in_order(wrong, items(), 4))
    with pytest.raises(UserError, match="after item 5"):
        done.extend(map_in_order(uneven, items(), 4))


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(map_in_order(lambda number: 1 // number, [1, 0], 1))


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(UserError, match="--workers 2: a worker was killed"):
        list(map_in_order(lambda number: os.kill(os.getpid(), 9), range(9), 2))


def process_of(number: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_way_after_their_turns(workers: int) -> None:
    pids = [pid for _, pid in map_in_order(process_of, range(20), workers, turns=2)]
    assert all(pids.count(pid) <= 2 for pid in pids)
    assert len(set(pids)) >= 10
    assert [result for _, result in map_in_order(uneven, range(20), workers, turns=1)] == [n * n for n in range(20)]


def test_something_can_be_done_meanwhile() -> None:
    done: list[str] = []
    results = map_in_order(uneven, range(5), 2, meanwhile=lambda: done.append("once"))
    assert len(list(results)) == 5
    assert done == ["once"]


def test_the_background_answers_or_raises() -> None:
    with in_background(uneven, 7) as answer:
        assert answer() == 49

    def wrong(number: int) -> int:
        raise UserError("a mistake")

    with in_background(wrong, 0) as answer, pytest.raises(UserError, match="a mistake"):
        answer()
