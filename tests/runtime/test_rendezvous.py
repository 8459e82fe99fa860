"""Ranks of one life find each other in a store full of what earlier lives have left."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megalong.errors import UserError
from megalong.runtime.distributed import _rendezvous
from megalong.runtime.rendezvous import store_of_this_life

WORLD = 3


def life(shared: dist.Store, ranks: range, seconds: float = 60) -> list[dist.Store | None]:
    stores: list[dist.Store | None] = [None] * WORLD

    def join(rank: int) -> None:
        with contextlib.suppress(TimeoutError, dist.DistStoreError):
            stores[rank] = store_of_this_life(shared, rank, WORLD, datetime.timedelta(seconds=seconds))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stores


def test_no_life_reads_what_another_wrote() -> None:
    shared = dist.HashStore()
    for number in range(3):
        # A life in which a rank never comes leaves its greetings behind.
        assert life(shared, range(number % WORLD), seconds=0.2)[0] is None
        stores = life(shared, range(WORLD))
        assert all(store is not None for store in stores)
        assert not any(store.check(["address"]) for store in stores if store is not None)
        assert stores[1] is not None
        stores[1].set("address", str(number))
        assert [bytes(store.get("address")).decode() for store in stores if store is not None] == [str(number)] * WORLD


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not take part"):
        store_of_this_life(dist.HashStore(), 0, 2, datetime.timedelta(seconds=0.1))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port that another process listens on, as this rank's MASTER_PORT."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        yield listener


def test_a_port_that_is_taken_is_told_in_one_line(taken: socket.socket) -> None:
    with pytest.raises(UserError, match=r"^MASTER_PORT \d+ of this host is in use by another process.*=P\)$"):
        _rendezvous(datetime.timedelta(seconds=5))


def test_a_first_rank_that_is_not_there_is_told_in_one_line(
    taken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken.close()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^rank 1 cannot reach rank 0 at 127\.0\.0\.1:\d+ \(MASTER_ADDR") as error:
        _rendezvous(datetime.timedelta(seconds=1))
    assert error.value.speaker == "node"
    assert "\n" not in str(error.value)
