"""The interface towards the other hosts, for gloo and NCCL, and what every rank knows of every other.

gloo listens at the address that its host's own name resolves to. On Debian that is 127.0.1.1 (`/etc/hosts`), where no
other host can connect to; with several interfaces it may be one that leads nowhere. So every rank asks its routing
table which of its addresses it would use towards the host of the store (`connect` on a UDP socket sends nothing), and
says in the store who it is before the first group is made:

    rank 1 on b    route to MASTER_ADDR: 10.0.0.2, of eth1             GLOO_SOCKET_IFNAME=eth1, NCCL_SOCKET_IFNAME==eth1
    rank 0 on a    route to MASTER_ADDR: to itself, at whatever address its name resolves to
                   route to 10.0.0.2, who has said so: 10.0.0.1, eth1  the same

Where all ranks are on one host, gloo gets the loopback, which is always up, and NCCL, which needs no socket there but
to begin, is left alone. A variable that is set already is the user's and stays. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"
_ANY_PORT = 9  # of a connection that is never made


class Store(Protocol):
    """What of `torch.distributed.Store` is needed."""

    def set(self, key: str, value: str, /) -> None:
        """Tell all."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Wait until all keys are there."""


@dataclass(frozen=True)
class Endpoint:
    """Where one rank is.

    Attributes:
        host: SLURM's name of its node, else the machine's.
        address: its host's own, towards the host of the store; empty on that host itself.
        interface: the one that `address` belongs to; empty where it is not known.
        port: where it listens for `peers.lost`.
    """

    rank: int
    host: str
    address: str
    interface: str
    port: int


def node_name() -> str:
    """This node's name in SLURM, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Route:
    """How this host reaches another: its own address and interface, both empty towards itself; the other's address."""

    address: str
    interface: str
    peer: str


def meet(store: Store, rank: int, world: int, route: Route, port: int) -> tuple[Endpoint, ...]:
    """Exchange endpoints with all ranks, all of which call this; the endpoints by rank.

    Args:
        route: to the host of the store.
    """
    mine = Endpoint(rank, node_name(), route.address, route.interface, port)
    store.set(f"endpoint/{rank}", json.dumps(dataclasses.asdict(mine)))
    told = store.multi_get([f"endpoint/{other}" for other in range(world)])
    return tuple(Endpoint(**json.loads(bytes(text))) for text in told)


def master() -> str:
    """Name or address of the host of the store."""
    return os.environ.get("MASTER_ADDR") or LOOPBACK


def route_to(host: str) -> Route:
    """The way to `host`, a name or an address; to this host itself where nobody knows one."""
    try:
        candidates = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        candidates = []
    for family, kind, protocol, _, address in candidates:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                name, *rest = probe.getsockname()
                peer = str(probe.getpeername()[0])
        except OSError:  # no route in this family of addresses
            continue
        if _is_loopback(name) or name == peer:
            return Route("", "", peer)
        scope = rest[2] if len(rest) > 2 else 0
        return Route(name, socket.if_indextoname(scope) if scope else _owner(name), peer)
    return Route("", "", LOOPBACK)


def choose(endpoints: Sequence[Endpoint], mine: Endpoint) -> str | None:
    """The interface towards the other hosts; None where there is no other, empty where it cannot be found."""
    if len({(endpoint.host, endpoint.address) for endpoint in endpoints}) == 1:
        return None
    if mine.address:
        return mine.interface
    # The store is on this host. Where nobody has an address, all are on this machine, whatever they call it.
    return next((route_to(endpoint.address).interface for endpoint in endpoints if endpoint.address), None)


def tell_backends(interface: str | None, environment: MutableMapping[str, str]) -> None:
    """Set gloo's and NCCL's variables in `environment` (`os.environ`) to what `choose` found, unless they are set."""
    if interface is None:
        loopback = _owner(LOOPBACK)
        if loopback:
            environment.setdefault(GLOO, loopback)
    elif interface:
        environment.setdefault(GLOO, interface)
        # NCCL takes a bare name as the beginning of names.
        environment.setdefault(NCCL, f"={interface}")


def describe(endpoints: Sequence[Endpoint], interface: str | None, users: Mapping[str, str]) -> str:
    """One line: which hosts talk over which interface.

    Args:
        interface: of the host of rank 0, which asks.
        users: variables that were set by the user.
    """
    by_interface: dict[str, list[str]] = {}
    for endpoint in endpoints:
        name = (endpoint.interface or interface) if endpoint.address else interface
        hosts = by_interface.setdefault(name or "an interface of their own choice", [])
        if endpoint.host not in hosts:
            hosts.append(endpoint.host)
    chosen = "; ".join(f"{name} on {_listed(hosts)}" for name, hosts in by_interface.items())
    kept = "".join(f"; {name}={value} is kept" for name, value in users.items())
    return f"network: the way to the other hosts is {chosen}{kept}"


def _listed(hosts: Sequence[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 4 else f"{', '.join(hosts[:2])} and {len(hosts) - 2} more hosts"


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _owner(address: str) -> str:
    """The interface that has `address`; empty where none has."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return ""
