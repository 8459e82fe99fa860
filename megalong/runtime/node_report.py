"""One process's report on its node before a run starts there: a plain dataclass, sent as JSON.

A GPU is healthy if it is free, its driver counts no uncorrected memory errors, it is not slowed down by heat or power,
and a matrix product with a known result is exactly right:

    ones [n, n] @ ones [n, n] = n everywhere; exact in bf16 for a power of two
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from megalong.runtime.gpus import use
from megalong.runtime.network import node_name

PACKAGES = ("megalong", "torch", "megatron-core", "transformer-engine", "numpy")
_PROBE = 2048
_BUSY_SHARE = 0.1  # of a GPU's memory; our own context and a display use less
_WAIT_SECONDS = 15.0  # on NFS, another node's files appear late


@dataclass(frozen=True)
class NodeReport:
    """One process's findings.

    Attributes:
        node: SLURM's name of the node, else the machine's.
        versions: of packages, Python, NCCL and driver, which must be equal on all nodes.
        gpus: number of GPUs that torch sees on the node, None if the run uses CPUs.
        memory: bytes of this rank's GPU, or of the node's free memory.
        probe_seconds: of one matrix product, the fastest of several.
        faults: what is wrong here, one clause each.
    """

    rank: int
    node: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: int | None = None
    memory: int = 0
    probe_seconds: float = 0.0
    faults: tuple[str, ...] = ()

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Self:
        """From what `dumps` wrote."""
        values = json.loads(text)
        return cls(**{**values, "faults": tuple(values["faults"])})


def inspect_node(rank: int, local_rank: int, local_world: int, device_type: str, token: Path | None) -> NodeReport:
    """Inspect this node, and the GPU of `local_rank`.

    Args:
        local_world: processes of the run on this node.
        token: file that rank 0 has written in the run folder; a node that does not see it has another run folder.
    """
    faults = [] if token is None or local_rank else _shared(token)
    gpus, memory = None, _host_memory()
    if device_type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus <= local_rank:
            faults.append(f"has {gpus} GPUs that torch can use, not the {local_world} its processes need")
            return NodeReport(rank, node_name(), versions(), gpus, 0, 0.0, tuple(faults))
        faults += _driver_faults() if local_rank == 0 else []
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    seconds = 0.0
    try:
        use(device)
        if device.type == "cuda":
            free, memory = torch.cuda.mem_get_info(device)
            if free < (1 - _BUSY_SHARE) * memory:
                used = (memory - free) / 2**30
                faults.append(f"GPU {local_rank} is in use: {used:.1f} GiB are taken before we start")
        seconds, right = probe(device)
        if not right:
            faults.append(f"{device} computes a wrong matrix product")
    except RuntimeError as error:  # a GPU that has fallen off the bus, or is out of memory
        faults.append(f"{device} cannot compute: {str(error).splitlines()[0]}")
    return NodeReport(rank, node_name(), versions(), gpus, memory, seconds, tuple(faults))


def versions() -> dict[str, str]:
    """Versions that must be equal on all nodes of a run; `-` for what is missing."""
    found = {name: _version(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _smi("driver_version")[0] if _smi("driver_version") else "-"
    return found


def probe(device: torch.device, size: int | None = None, repeats: int = 3) -> tuple[float, bool]:
    """Seconds of one matrix product (the fastest of `repeats`), and whether its result is right."""
    size = size or (_PROBE if device.type == "cuda" else 256)
    ones = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best, product = float("inf"), ones
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        product = ones @ ones
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best, bool((product == size).all())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shared(token: Path) -> list[str]:
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if token.name in os.listdir(token.parent) and os.access(token.parent, os.W_OK):
                return []
        except OSError:
            pass
        time.sleep(0.2)
    return [f"does not see, or may not write, the run folder {token.parent} of the first node"]


def _driver_faults() -> list[str]:
    """Faults of this node's GPUs by nvidia-smi; empty if it cannot be run."""
    faults = []
    for index, count in enumerate(_smi("ecc.errors.uncorrected.volatile.total")):
        if count.isdigit() and int(count):
            faults.append(f"GPU {index} has {count} uncorrected memory errors: have it reset or replaced")
    for index, slowed in enumerate(_smi("clocks_throttle_reasons.hw_slowdown")):
        if slowed == "Active":
            faults.append(f"GPU {index} is being slowed down by its hardware (heat or power)")
    return faults


def _smi(query: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _host_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
