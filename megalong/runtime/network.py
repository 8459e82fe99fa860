"""Choose the interface to the other hosts for gloo and NCCL, and exchange every rank's endpoint.

gloo listens at the address to which its host's own name resolves. On Debian that is 127.0.1.1 (`/etc/hosts`), to which
no other host can connect; with several interfaces it may be one without a route. So every rank asks its routing table
which of its addresses leads to the host of the store (`connect` on a UDP socket sends nothing), and puts its endpoint
into the store before the first group is made:

    rank 1 on b    route to MASTER_ADDR: 10.0.0.2, of eth1             GLOO_SOCKET_IFNAME=eth1, NCCL_SOCKET_IFNAME==eth1
    rank 0 on a    route to MASTER_ADDR: to itself, at whatever address its name resolves to
                   route to 10.0.0.2, rank 1's endpoint: 10.0.0.1, eth1    the same

If all ranks are on one host, gloo gets the loopback, which is always up; NCCL, which needs a socket there only to
start, is left alone. A variable that the user has set is left alone. Needs no torch.
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
_ANY_PORT = 9  # no connection is made


class Store(Protocol):
    """The methods of `torch.distributed.Store` that are used here."""

    def set(self, key: str, value: str, /) -> None:
        """Publish a value."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Wait for all keys, and return their values."""


@dataclass(frozen=True)
class Endpoint:
    """Where one rank is.

    Attributes:
        host: SLURM's name of its node, else the machine's.
        address: its host's address towards the host of the store; empty on that host itself.
        interface: the interface with `address`; empty if unknown.
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
    """How this host reaches `peer`, an address: its own address and interface, both empty if the peer is this host."""

    address: str
    interface: str
    peer: str


def exchange_endpoints(store: Store, rank: int, world: int, route: Route, port: int) -> tuple[Endpoint, ...]:
    """Exchange endpoints with all ranks; collective. Returns them by rank.

    Args:
        route: to the host of the store.
    """
    mine = Endpoint(rank, node_name(), route.address, route.interface, port)
    store.set(f"endpoint/{rank}", json.dumps(dataclasses.asdict(mine)))
    texts = store.multi_get([f"endpoint/{other}" for other in range(world)])
    return tuple(Endpoint(**json.loads(bytes(text))) for text in texts)


def master() -> str:
    """Name or address of the store's host."""
    return os.environ.get("MASTER_ADDR") or LOOPBACK


def route_to(host: str) -> Route:
    """The route to `host`, a name or an address; the route to this host itself if `host` has no route."""
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
    """The interface to the other hosts; None if there is no other host, empty if it cannot be found."""
    if len({(endpoint.host, endpoint.address) for endpoint in endpoints}) == 1:
        return None
    if mine.address:
        return mine.interface
    # The store is on this host. If no endpoint has an address, all ranks are on this machine, whatever its names.
    return next((route_to(endpoint.address).interface for endpoint in endpoints if endpoint.address), None)


def set_interface_variables(interface: str | None, environment: MutableMapping[str, str]) -> None:
    """Set gloo's and NCCL's variables in `environment` to the result of `choose`, unless they are set."""
    if interface is None:
        loopback = _owner(LOOPBACK)
        if loopback:
            environment.setdefault(GLOO, loopback)
    elif interface:
        environment.setdefault(GLOO, interface)
        # NCCL treats a bare name as a prefix.
        environment.setdefault(NCCL, f"={interface}")


def describe(endpoints: Sequence[Endpoint], interface: str | None, users: Mapping[str, str]) -> str:
    """One line: which hosts communicate over which interface.

    Args:
        interface: of the host of rank 0, which calls this.
        users: variables that the user has set.
    """
    by_interface: dict[str, list[str]] = {}
    for endpoint in endpoints:
        name = (endpoint.interface or interface) if endpoint.address else interface
        hosts = by_interface.setdefault(name or "gloo's and NCCL's own choice", [])
        if endpoint.host not in hosts:
            hosts.append(endpoint.host)
    chosen = "; ".join(f"{name} on {_listed(hosts)}" for name, hosts in by_interface.items())
    kept = "".join(f"; keeping {name}={value}" for name, value in users.items())
    return f"network: interface to the other hosts: {chosen}{kept}"


def _listed(hosts: Sequence[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 4 else f"{', '.join(hosts[:2])} and {len(hosts) - 2} more hosts"


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _owner(address: str) -> str:
    """The interface with `address`; empty if no interface has it."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return ""
