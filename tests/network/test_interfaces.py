"""Which interface gloo and NCCL are told to use, on hosts that have two, whatever their own names resolve to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megalong.runtime.network import GLOO, NCCL, set_interface_variables
from tests.network.hosts import DECOY, LINK, Hosts
from tests.network.runs import meet

WAY = f"network: interface to the other hosts: {LINK} on a, b"


@pytest.fixture
def named(hosts: Hosts) -> Iterator[Hosts]:
    """The hosts, whose names a test may lead elsewhere."""
    yield hosts
    hosts.resolve()


@pytest.mark.parametrize(
    ("own", "master"),
    [
        ("127.0.1.1", "a"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("decoy", "a"), ("nothing", "address"))),
    ],
)
def test_it_is_the_one_towards_the_master(named: Hosts, own: str, master: str, tmp_path: Path) -> None:
    """By itself gloo listens at the address of its host's own name, and NCCL at its first interface: the decoy."""
    named.resolve(own)
    found = meet(named, tmp_path, "abb", named.addresses["a"] if master == "address" else master)
    assert [one["sum"] for one in found] == [6] * 3
    assert [one["host"] for one in found] == list("abb")
    assert [(one[GLOO], one[NCCL]) for one in found] == [(LINK, f"={LINK}")] * 3
    assert found[0]["said"] == WAY


@pytest.mark.slow
def test_the_users_choice_stays(hosts: Hosts, tmp_path: Path) -> None:
    found = meet(hosts, tmp_path, "ab", "a", **{NCCL: f"^{DECOY}"})
    assert [(one["sum"], one[GLOO], one[NCCL]) for one in found] == [(3, LINK, f"^{DECOY}")] * 2
    assert found[0]["said"] == f"{WAY}; keeping {NCCL}=^{DECOY}"


@pytest.mark.parametrize(
    ("interface", "users", "expected"),
    [
        ("eth1", {}, {GLOO: "eth1", NCCL: "=eth1"}),
        ("eth1", {GLOO: "ib0"}, {GLOO: "ib0", NCCL: "=eth1"}),
        ("eth1", {NCCL: "mlx5"}, {GLOO: "eth1", NCCL: "mlx5"}),
        ("", {}, {}),
        (None, {}, {GLOO: "lo"}),
        (None, {GLOO: "ib0", NCCL: "mlx5"}, {GLOO: "ib0", NCCL: "mlx5"}),
    ],
)
def test_what_is_set_already_stays(interface: str | None, users: dict[str, str], expected: dict[str, str]) -> None:
    """`""`: other hosts, over an interface that could not be found; `None`: no other host."""
    environment = dict(users)
    set_interface_variables(interface, environment)
    assert environment == expected


def test_one_host_needs_no_network(hosts: Hosts, tmp_path: Path) -> None:
    found = meet(hosts, tmp_path, "bb", "b")
    assert [(one["sum"], one["said"], one[GLOO], one[NCCL]) for one in found] == [(3, None, "lo", None)] * 2


@pytest.mark.slow
def test_hosts_of_ipv6_alone(hosts: Hosts, tmp_path: Path) -> None:
    with Hosts(tmp_path, ipv6=True) as others:
        found = meet(others, tmp_path, "ab", others.addresses["a"])
    assert [(one["sum"], one[GLOO], one[NCCL]) for one in found] == [(3, LINK, f"={LINK}")] * 2
