"""Find out which host or rank is gone: a failed collective does not say because of whom it failed or timed out.

Every rank has a listening socket that nobody reads: the kernel accepts connections for a process as long as it lives,
even if it hangs. When a collective has failed, or the watchdog fires, a rank tries to connect to all others:

    connected     the process lives
    refused       the host lives, the process does not
    no answer     the host is down, or the network to it

This needs neither the store, which is lost with its host, nor a heartbeat thread, and it cannot end a healthy run. So a
lost host is noticed only when a collective reaches `runtime.timeout_minutes`, or the watchdog fires. Two hosts whose
link is cut name each other.
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

SECONDS = 5.0  # a lost first packet is sent again after one and three seconds
_BACKLOG = 4096  # nobody accepts the connections, and every rank may try once
STATUS = 1

_ALIVE, _ENDED, _SILENT = "alive", "ended", "silent"
_listener: socket.socket | None = None
_endpoints: tuple[Endpoint, ...] = ()
_rank = 0
_master = network.LOOPBACK
_network_line: str | None = None


def join(store: network.Store, rank: int, world: int) -> None:
    """Exchange endpoints with all ranks, and set the interface for gloo and NCCL; collective."""
    global _listener, _endpoints, _rank, _master, _network_line
    leave()
    _listener = _listen()
    route = network.route_to(network.master())
    # An address, because resolving a name may need the network that is lost.
    _rank, _master = rank, route.peer
    _endpoints = network.exchange_endpoints(store, rank, world, route, _listener.getsockname()[1])
    interface = network.choose(_endpoints, _endpoints[rank])
    users = {name: os.environ[name] for name in (network.GLOO, network.NCCL) if name in os.environ}
    network.set_interface_variables(interface, os.environ)
    _network_line = None if interface is None else network.describe(_endpoints, interface, users)


def leave() -> None:
    """Stop listening; call before leaving the groups, so that ranks that still wait find this one gone."""
    global _listener, _endpoints, _network_line
    if _listener is not None:
        _listener.close()
    _listener, _endpoints, _network_line = None, (), None


def network_line() -> str | None:
    """The chosen interfaces, for the log; None on one host."""
    return _network_line


def lost(seconds: float = SECONDS) -> str | None:
    """Which hosts or ranks are gone; None if all answer. Takes up to `seconds`; safe in any thread."""
    others = [endpoint for endpoint in _endpoints if endpoint.rank != _rank]
    if not others:
        return None
    return verdict(others, asyncio.run(_ask_all(others, seconds)), _endpoints[_rank].host)


def verdict(others: Sequence[Endpoint], found: Sequence[str], here: str) -> str | None:
    """Describe who is gone by the answers `found` of the `others`; None if nobody is."""
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
    return f"ended before this rank: {', '.join(parts)}: see their logs" if parts else None


def report_if_lost() -> str | None:
    """`lost()`, also printed to stderr without a logger, for a thread in a process where anything may hang."""
    gone = lost()
    if gone is not None:
        os.write(2, f"rank {_rank}: {gone}\n".encode())
    return gone


def end_if_lost(error: BaseException) -> None:
    """After `error`: if a rank is gone, log this and end the process, else return.

    Nothing still in progress can succeed: collectives of other threads would wait for their own timeouts, and an
    incomplete checkpoint is not published.
    """
    if isinstance(error, UserError | KeyboardInterrupt | SystemExit) or (gone := lost()) is None:
        return
    traceback.print_exception(error)
    log.error("%s; this run ends here; run the same command to resume", gone)
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
            # An endpoint without an address is on the store's host.
            _, writer = await asyncio.open_connection(endpoint.address or _master, endpoint.port)
    except ConnectionRefusedError:
        return _ENDED
    except OSError:  # includes timeouts
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
    """A forked helper (a data worker) must not accept connections for a rank that is gone."""
    if _listener is not None:
        _listener.close()


os.register_at_fork(after_in_child=_close_in_child)
