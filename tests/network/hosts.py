"""Two hosts on this machine: network namespaces with names and addresses of their own, and a switch between them.

    a  10.213.7.1 link0 ── port-a ┐                      ┌ port-b ── link0 10.213.7.2  b
                                  ├─ bridge in a third ──┤
    a  10.214.7.1 decoy ── (up, leads nowhere)           (up, leads nowhere) ── decoy  b

Nothing of this machine's own network is touched. A process enters a host for good: its network, its host name and its
/etc/hosts; files are this machine's, as on a cluster's shared file system. Leaving the fixture kills what still runs
within, and removes the namespaces. Made by root only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

NAMES = ("a", "b")
ADDRESSES = {"a": "10.213.7.1", "b": "10.213.7.2"}
ADDRESSES_6 = {"a": "fd00:213:7::1", "b": "fd00:213:7::2"}
DECOYS = {"a": "10.214.7.1", "b": "10.214.7.2"}
LINK, DECOY = "link0", "decoy0"

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000  # linux/sched.h
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18  # linux/mount.h


class Hosts:
    """The two hosts and their switch, once entered."""

    def __init__(self, folder: Path, ipv6: bool = False) -> None:
        """
        Args:
            folder: for each host's /etc/hosts.
            ipv6: the hosts have no IPv4 address but the decoy's and the loopback's.
        """
        self.folder, self.addresses = folder, ADDRESSES_6 if ipv6 else ADDRESSES
        self._bits = 64 if ipv6 else 24
        self.prefix = f"megalong-{uuid.uuid4().hex[:8]}"
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs within the hosts, and remove them."""
        for space in self._made:
            _kill_all(space)
        for space in self._made:
            _ip("netns", "delete", space, check=False)
        self._made.clear()

    def resolve(self, own: str = "127.0.1.1") -> None:
        """Write /etc/hosts.

        Args:
            own: where each host's own name leads, beside which the other's is right: an address; `decoy`, its decoy's;
                `nothing`, and then the other's leads nowhere either, as where only a scheduler knows the addresses.
        """
        for name in NAMES:
            lines = ["127.0.0.1 localhost", "::1 localhost"]
            for other in NAMES if own != "nothing" else ():
                address = self.addresses[other]
                if other == name:
                    address = DECOYS[name] if own == "decoy" else own
                lines.append(f"{address} {other}")
            self._hosts_file(name).write_text("\n".join(lines) + "\n")

    def variables(self, name: str) -> dict[str, str]:
        """What tells `enter_this` where to go."""
        return {"TEST_HOST": name, "TEST_NAMESPACE": self._space(name), "TEST_HOSTS_FILE": str(self._hosts_file(name))}

    def start(self, name: str, words: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, in a session of its own; what it prints is appended to `log`."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, __file__, *words],
                env={**os.environ, **self.variables(name), **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def cut(self, name: str, silently: bool = False) -> None:
        """Cut a host's cable: its end goes down, or, silently, the switch forgets it and nobody sees anything."""
        port = f"port-{name}"
        _ip("-n", self._space("switch"), "link", "set", port, *(["nomaster"] if silently else ["down"]))

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        for words in (["up"], ["master", "bridge"]):
            _ip("-n", self._space("switch"), "link", "set", f"port-{name}", *words)

    def reboot(self, name: str) -> None:
        """Let a host lose its power and come back: its processes are gone, and nobody was told."""
        space = self._space(name)
        for port in (f"port-{name}", f"nowhere-{name}"):
            _ip("-n", self._space("switch"), "link", "delete", port)
        _kill_all(space)
        _ip("netns", "delete", space)
        self._made.remove(space)
        self._add_host(name)

    def _space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _hosts_file(self, name: str) -> Path:
        return self.folder / f"hosts-{name}"

    def _make(self) -> None:
        switch = self._add_space("switch")
        # No spanning tree, no snooping: a port passes packets on at once.
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for name in NAMES:
            self._add_host(name)
        self.resolve()

    def _add_host(self, name: str) -> None:
        self._add_space(name)
        self._plug(name, DECOY, f"nowhere-{name}", f"{DECOYS[name]}/24")
        self._plug(name, LINK, f"port-{name}", f"{self.addresses[name]}/{self._bits}")
        self.mend(name)

    def _add_space(self, name: str) -> str:
        space = self._space(name)
        _ip("netns", "add", space)
        self._made.append(space)
        _ip("-n", space, "link", "set", "lo", "up")
        return space

    def _plug(self, name: str, interface: str, port: str, address: str) -> None:
        space, switch = self._space(name), self._space("switch")
        # The same card after `reboot`: the others know where to find it.
        card = f"02:00:{'00' if interface == LINK else '01'}:00:00:0{NAMES.index(name) + 1}"
        peer = ("peer", "name", port, "netns", switch)
        _ip("-n", space, "link", "add", interface, "address", card, "type", "veth", *peer)
        # An IPv6 address is usable at once only if nobody is asked whether it is taken.
        unasked = ["nodad"] if ":" in address else []
        _ip("-n", space, "address", "add", address, "dev", interface, *unasked)
        _ip("-n", switch, "link", "set", port, "up")
        _ip("-n", space, "link", "set", interface, "up")


def missing() -> str | None:
    """Why no hosts can be made here, None where they can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    probe = f"megalong-{uuid.uuid4().hex[:8]}-probe"
    try:
        _ip("netns", "add", probe)
    except FileNotFoundError:
        return "iproute2 is not installed (apt-get install iproute2)"
    except RuntimeError as error:
        return f"no right to make network namespaces here: {error}"
    try:
        _ip("-n", probe, "link", "add", "bridge", "type", "bridge")
        _ip("-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "other")
    except RuntimeError as error:
        return f"this kernel makes no bridge, or no virtual Ethernet: {error}"
    finally:
        _ip("netns", "delete", probe, check=False)
    return None


def enter_this() -> None:
    """Enter the host that `Hosts.variables` name, with this process, which must not have begun a thread yet."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    space = os.open(f"/run/netns/{os.environ['TEST_NAMESPACE']}", os.O_RDONLY)
    call("setns", space, _CLONE_NEWNET)
    os.close(space)
    call("unshare", _CLONE_NEWNS | _CLONE_NEWUTS)
    call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    call("mount", os.environ["TEST_HOSTS_FILE"].encode(), b"/etc/hosts", None, _MS_BIND, None)
    socket.sethostname(os.environ["TEST_HOST"])


def _kill_all(space: str) -> None:
    for pid in _ip("netns", "pids", space, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    enter_this()
    os.execvp(sys.argv[1], sys.argv[1:])
