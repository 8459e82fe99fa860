"""A separate store for each life of a run, because torchrun's store outlives the processes that it restarts.

With `--max-restarts` the processes of the next life use the store of the previous one (torch 2.13 keeps it across
rounds) and would read addresses of processes that are gone. A restart count would distinguish lives on one node only,
because a node with healthy workers does not count. So rank 0 makes up a name for this life and sends it to every rank
that is alive now:

    rank r    hello/r = a nonce of its own            waits for welcome/<nonce>, which no earlier life can have set
    rank 0    reads hello/r, sets welcome/<nonce> = name of the life, until ack/<name>/r is set
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

_POLL_SECONDS = 0.02


def store_of_this_life(store: dist.Store, rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """`store` with a prefix that all live ranks have agreed on; collective.

    Raises:
        TimeoutError: a rank did not take part in time.
    """
    store = dist.PrefixStore("megalong", store)
    store.set_timeout(timeout)
    name = _receive_name(store, rank) if rank else _send_name(store, world, timeout)
    return dist.PrefixStore(name, store)


def _receive_name(store: dist.Store, rank: int) -> str:
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    name = bytes(store.get(f"welcome/{nonce}")).decode()
    store.set(f"ack/{name}/{rank}", "")
    return name


def _send_name(store: dist.Store, world: int, timeout: datetime.timedelta) -> str:
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing, welcomed = set(range(1, world)), set()
    while True:
        for rank in sorted(missing):
            # The nonce may be from an earlier life, so its owner must acknowledge.
            if store.check([f"hello/{rank}"]) and (nonce := bytes(store.get(f"hello/{rank}")).decode()) not in welcomed:
                welcomed.add(nonce)
                store.set(f"welcome/{nonce}", name)
            if store.check([f"ack/{name}/{rank}"]):
                missing.remove(rank)
        if not missing:
            return name
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not take part within {timeout}")
        time.sleep(_POLL_SECONDS)
