"""A store of this life's own, where torchrun's outlives the processes it starts again.

With `--max-restarts` the next life's processes meet in the store of the last one (torch 2.13 keeps it over rounds), and
read addresses of processes that are gone. A count of restarts would tell lives apart on one node only: a node whose
workers were well does not count. So rank 0 thinks of a name for this life and tells it to every rank that lives now:

    rank r    hello/r = a nonce of its own            waits for welcome/<nonce>, which nobody can have left behind
    rank 0    reads hello/r, sets welcome/<nonce> = name of the life, until ack/<name>/r is there
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

_POLL_SECONDS = 0.02


def store_of_this_life(store: dist.Store, rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """`store` under a prefix that all ranks which live now have agreed on; every rank calls this.

    Raises:
        TimeoutError: a rank did not come.
    """
    store = dist.PrefixStore("megalong", store)
    store.set_timeout(timeout)
    name = _name_by_others(store, rank) if rank else _name_for_others(store, world, timeout)
    return dist.PrefixStore(name, store)


def _name_by_others(store: dist.Store, rank: int) -> str:
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    name = bytes(store.get(f"welcome/{nonce}")).decode()
    store.set(f"ack/{name}/{rank}", "")
    return name


def _name_for_others(store: dist.Store, world: int, timeout: datetime.timedelta) -> str:
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing, welcomed = set(range(1, world)), set()
    while True:
        for rank in sorted(missing):
            # What lies there may be of an earlier life, so its owner has to answer.
            if store.check([f"hello/{rank}"]) and (nonce := bytes(store.get(f"hello/{rank}")).decode()) not in welcomed:
                welcomed.add(nonce)
                store.set(f"welcome/{nonce}", name)
            if store.check([f"ack/{name}/{rank}"]):
                missing.remove(rank)
        if not missing:
            return name
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {timeout}")
        time.sleep(_POLL_SECONDS)
