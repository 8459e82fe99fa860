"""Who is gone? A collective that fails says that it failed, or that it took too long, but not because of which host.

Every rank has a socket that listens and that nobody reads: the kernel answers for a process as long as it lives, even
one that hangs. When a collective has failed, or the watchdog wakes, a rank tries to connect to all others:

    connected     the process lives
    refused       the host lives, the process does not
    no answer     the host, or what lies between

That needs neither the store, which is gone with its host, nor a thread that beats beside the training, and it cannot
end a run that is well. A host that is lost is thus noticed when a collective has waited `runtime.timeout_minutes`, or
the watchdog its minutes, and not before. Two hosts whose link is cut name each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import traceback
from collections.abc import Sequence

from megalong.errors import UserError
from megalong.runtime import network
from megalong.runtime.network import Endpoint

log = logging.getLogger("megalong")

SECONDS = 5.0  # a first packet that is lost is sent again after one and after three
_BACKLOG = 4096  # nobody takes connections off the queue, and every rank may ask once
STATUS = 1

_ALIVE, _ENDED, _SILENT = "alive", "ended", "silent"
_listener: socket.socket | None = None
_endpoints: tuple[Endpoint, ...] = ()
_rank = 0
_master = network.LOOPBACK
_said: str | None = None


def meet(store: network.Store, rank: int, world: int) -> None:
    """Get to know all ranks, and tell gloo and NCCL which interface leads to them; all ranks call this."""
    global _listener, _endpoints, _rank, _master, _said
    leave()
    _listener = _listen()
    route = network.route_to(network.master())
    # An address, because names may need the network that is gone.
    _rank, _master = rank, route.peer
    _endpoints = network.meet(store, rank, world, route, _listener.getsockname()[1])
    interface = network.choose(_endpoints, _endpoints[rank])
    users = {name: os.environ[name] for name in (network.GLOO, network.NCCL) if name in os.environ}
    network.tell_backends(interface, os.environ)
    _said = None if interface is None else network.describe(_endpoints, interface, users)


def leave() -> None:
    """Be found by nobody any more; to be called before the groups are left, so that who misses them finds out why."""
    global _listener, _endpoints, _said
    if _listener is not None:
        _listener.close()
    _listener, _endpoints, _said = None, (), None


def way() -> str | None:
    """What was chosen, for the log; None on one host."""
    return _said


def lost(seconds: float = SECONDS) -> str | None:
    """Which hosts, or which ranks, are gone; None where all of them answer. Takes up to `seconds`, for any thread."""
    others = [endpoint for endpoint in _endpoints if endpoint.rank != _rank]
    if not others:
        return None
    return verdict(others, asyncio.run(_ask_all(others, seconds)), _endpoints[_rank].host)


def verdict(others: Sequence[Endpoint], found: Sequence[str], here: str) -> str | None:
    """What these answers of the `others` say, in words; None where there is nothing to say."""
    by_host: dict[str, list[tuple[int, str]]] = {}
    for endpoint, answer in zip(others, found, strict=True):
        by_host.setdefault(endpoint.host, []).append((endpoint.rank, answer))
    silent = {host: pairs for host, pairs in by_host.items() if all(answer == _SILENT for _, answer in pairs)}
    if len(silent) > 1 and len(silent) == len(by_host.keys() - {here}):
        return f"host {here} reaches none of the {len(silent)} other hosts: it is the one without a network"
    if silent:
        hosts = ", ".join(f"{host} ({_ranks([rank for rank, _ in pairs])})" for host, pairs in silent.items())
        return f"no answer from host {hosts}: it is down, or the network between it and {here}"
    ended = {host: [rank for rank, answer in pairs if answer == _ENDED] for host, pairs in by_host.items()}
    parts = [f"{_ranks(ranks)} on host {host}" for host, ranks in ended.items() if ranks]
    return f"ended before this rank: {', '.join(parts)}: why is in their logs" if parts else None


def say_if_lost() -> str | None:
    """`lost()`, said on stderr without a logger, for a thread that ends a process in which anything may hang."""
    gone = lost()
    if gone is not None:
        os.write(2, f"rank {_rank}: {gone}\n".encode())
    return gone


def end_if_lost(error: BaseException) -> None:
    """After `error`: where a rank is gone, say so and end this process, else return.

    Nothing that is still under way can end well: collectives of other threads would wait for their own time-outs, and
    a checkpoint that is not complete is not published.
    """
    if isinstance(error, UserError | KeyboardInterrupt | SystemExit) or (gone := lost()) is None:
        return
    traceback.print_exception(error)
    log.error("%s; this run ends here, run the same command to resume", gone)
    logging.shutdown()
    os._exit(STATUS)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=_BACKLOG)


async def _ask_all(others: Sequence[Endpoint], seconds: float) -> list[str]:
    return await asyncio.gather(*(_ask(endpoint, seconds) for endpoint in others))


async def _ask(endpoint: Endpoint, seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds):
            # Who is seen at no address of its own is on the host of the store.
            _, writer = await asyncio.open_connection(endpoint.address or _master, endpoint.port)
    except ConnectionRefusedError:
        return _ENDED
    except OSError:  # a time-out is one
        return _SILENT
    writer.close()
    return _ALIVE


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 8-15`, `ranks 1, 4`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    together = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}-{ranks[-1]}" if together else f"ranks {', '.join(map(str, ranks))}"


def _close_in_child() -> None:
    """A forked helper (a data worker) must not answer for a rank that is gone."""
    if _listener is not None:
        _listener.close()


os.register_at_fork(after_in_child=_close_in_child)
