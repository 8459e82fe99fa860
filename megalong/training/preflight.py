"""`megalong preflight`: check within a minute, before training, whether the nodes fit the run; one line per bad node.

    srun --ntasks-per-node=8 megalong preflight CONFIG.yaml       what slurm/common.sh does before it trains

It has two parts, because a collective among bad nodes hangs without naming one. First every rank inspects its own node
and puts a report into rank 0's store, which needs only TCP; a node that does not report in time is named. If no node
has a fault, the ranks then join a process group and measure how fast they exchange tensors; if that takes too long, a
thread names the missing nodes and ends the process.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megalong.config.checks import check_model, check_world
from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.runtime import peers
from megalong.runtime.bandwidth import Bandwidth, measure
from megalong.runtime.folders import refuse_unwritable
from megalong.runtime.gpus import use
from megalong.runtime.network import node_name
from megalong.runtime.node_report import NodeReport, inspect_node
from megalong.training.node_judge import disk_fault, memory_faults, node_faults, silent_nodes, slow_nodes
from megalong.training.start import find_start

REPORT_SECONDS = 180.0  # includes importing torch from a cold file system
MEASURE_SECONDS = 300.0
_MEGABYTES = {"cuda": 256, "cpu": 8}


@dataclass(frozen=True)
class Process:
    """This process's place among the run's processes and nodes."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    nodes: tuple[str, ...]


def process_of_environment() -> Process:
    """Read from the environment of srun or torchrun; a single process if there is neither.

    Raises:
        UserError: the nodes do not all run the same number of processes.
    """
    rank = int(_first("RANK", "SLURM_PROCID", default="0"))
    world = int(_first("WORLD_SIZE", "SLURM_NTASKS", default="1"))
    local_rank = int(_first("LOCAL_RANK", "SLURM_LOCALID", default="0"))
    nodes = tuple(os.environ.get("MEGALONG_NODES", "").split()) or (node_name(),)
    if world % len(nodes):
        raise UserError(f"{world} processes on {len(nodes)} nodes ({', '.join(nodes)}): start the same number on each")
    return Process(rank, world, local_rank, world // len(nodes), nodes)


def _first(*names: str, default: str) -> str:
    return next((os.environ[name] for name in names if name in os.environ), default)


def preflight(config_path: str, overrides: Sequence[str] = (), report_seconds: float = REPORT_SECONDS) -> int:
    """Check the nodes this runs on; every rank returns 0, or 2 after rank 0 has named the bad ones.

    Raises:
        UserError: the configuration is wrong or does not fit the world, or the run fits on no node.
    """
    here = process_of_environment()
    try:
        return _preflight(here, config_path, overrides, report_seconds)
    except UserError as error:
        if {"world": here.rank, "node": here.local_rank}.get(error.speaker, 0):
            return 2  # another process prints it
        raise UserError(str(error), speaker="rank") from None


def _preflight(here: Process, config_path: str, overrides: Sequence[str], report_seconds: float) -> int:
    config = load_config(config_path, list(overrides))[0]
    check_world(config, here.world)
    store = _store(here, report_seconds)
    try:
        lines = _agree(store, here, "nodes", lambda: _inspect(store, here, config, report_seconds), report_seconds)
        if not lines and here.world > 1:
            measured = _measure(store, here, config)
            lines = _agree(store, here, "speed", lambda: _slow(store, here, config, measured), MEASURE_SECONDS)
        if here.rank == 0 and not lines:
            print(f"preflight: {len(here.nodes)} nodes, {here.world} processes: fit for {config.run.name}", flush=True)
        return 2 if lines else 0
    finally:
        _leave(store, here)


def _store(here: Process, seconds: float) -> dist.TCPStore:
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    timeout = datetime.timedelta(seconds=seconds)
    try:
        return dist.TCPStore(address, port, None, here.rank == 0, timeout, wait_for_workers=False)
    except (RuntimeError, TimeoutError):
        raise _unreachable(f"the first node {here.nodes[0]} does not answer at {address}:{port}") from None


def _unreachable(what: str) -> UserError:
    """An error that rank 0 cannot print; one process per node does."""
    return UserError(f"preflight: {node_name()}: {what}", speaker="node")


def _agree(store: dist.Store, here: Process, key: str, judge: Callable[[], list[str]], seconds: float) -> list[str]:
    """Rank 0's findings, on every rank; rank 0 prints them before the others read them and leave."""
    if here.rank == 0:
        try:
            lines = judge()
        except UserError as error:
            lines = [str(error)]
        for line in lines:
            print(f"megalong: error: preflight: {line}", flush=True)
        store.set(key, json.dumps(lines))
        return lines
    judge()
    try:
        store.wait([key], datetime.timedelta(seconds=2 * seconds))
        return list(json.loads(store.get(key)))
    except RuntimeError:
        raise _unreachable(f"the first node {here.nodes[0]} no longer answers") from None


def _inspect(store: dist.Store, here: Process, config: Config, seconds: float) -> list[str]:
    """Report on this node; rank 0 judges all reports."""
    token = _token_file(config, here)
    if here.rank == 0:
        refuse_unwritable(Path(config.run.dir), "run.dir")
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        store.set("token", "written")
    else:
        store.wait(["token"], datetime.timedelta(seconds=seconds))
    wanted = config.runtime.device
    device = "cpu" if wanted == "cpu" or (wanted == "auto" and not _gpus_expected(here)) else "cuda"
    report = inspect_node(here.rank, here.local_rank, here.local_world, device, token)
    if here.rank:
        store.add("reported", 1)  # before the report: rank 0 may judge and leave as soon as it has the report
    store.set(f"report/{here.rank}", report.dumps())
    if here.rank:
        return []
    try:
        return _judge(_collect(store, here.world, seconds), here, config, seconds)
    finally:
        token.unlink(missing_ok=True)


def _token_file(config: Config, here: Process) -> Path:
    return Path(config.run.dir) / f".preflight-{os.environ.get('SLURM_JOB_ID', 'here')}"


def _gpus_expected(here: Process) -> bool:
    """For `runtime.device: auto`: whether the job requested GPUs, or outside a job whether torch sees any."""
    requested = os.environ.get("GPUS_PER_NODE")
    return int(requested) > 0 if requested else torch.cuda.is_available()


def _collect(store: dist.Store, world: int, seconds: float) -> dict[int, NodeReport]:
    deadline, reports = time.monotonic() + seconds, {}
    for rank in range(world):
        left = max(0.01, deadline - time.monotonic())
        try:
            store.wait([f"report/{rank}"], datetime.timedelta(seconds=left))
        except RuntimeError:
            continue
        reports[rank] = NodeReport.loads(store.get(f"report/{rank}"))
    return reports


def _judge(found: dict[int, NodeReport], here: Process, config: Config, seconds: float) -> list[str]:
    reports = list(found.values())
    lines = silent_nodes(found, here.world, here.nodes, seconds) + node_faults(reports)
    if lines:
        return lines
    architecture = find_start(config).architecture
    check_model(config, architecture)
    lines = memory_faults(config, architecture, reports, here.world)
    full = disk_fault(config, architecture, here.nodes[0])
    return [*lines, *([full] if full else [])]


def _measure(store: dist.Store, here: Process, config: Config) -> Bandwidth:
    cuda = torch.cuda.is_available() and config.runtime.device != "cpu" and _gpus_expected(here)
    device = torch.device("cuda", here.local_rank) if cuda else torch.device("cpu")
    done = threading.Event()
    threading.Thread(target=_watch, args=(store, here, done), daemon=True).start()
    timeout = datetime.timedelta(seconds=MEASURE_SECONDS)
    use(device)
    joined = dist.PrefixStore("group", store)
    peers.join(joined, here.rank, here.world)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=joined, rank=here.rank, world_size=here.world, timeout=timeout
    )
    try:
        measured = measure(device, here.local_world, _MEGABYTES[device.type])
    finally:
        dist.destroy_process_group()
    store.set(f"speed/{here.rank}", json.dumps(asdict(measured)))
    done.set()
    return measured


def _watch(store: dist.Store, here: Process, done: threading.Event) -> None:
    """End a process that hangs in a collective, which its main thread cannot do."""
    if done.wait(MEASURE_SECONDS):
        return
    if here.rank == 0:
        missing = [rank for rank in range(here.world) if not store.check([f"speed/{rank}"])]
        nodes = sorted({here.nodes[rank // here.local_world] for rank in missing})
        print(
            f"megalong: error: preflight: nodes {', '.join(nodes)} did not finish exchanging tensors within "
            f"{MEASURE_SECONDS:g} s: check their network (NCCL_DEBUG=INFO shows more)",
            flush=True,
        )
    os._exit(2)


def _slow(store: dist.Store, here: Process, config: Config, mine: Bandwidth) -> list[str]:
    if here.rank:
        return []
    by_node: dict[str, list[Bandwidth]] = {}
    for rank in range(here.world):
        store.wait([f"speed/{rank}"], datetime.timedelta(seconds=MEASURE_SECONDS))
        found = Bandwidth(**json.loads(store.get(f"speed/{rank}")))
        by_node.setdefault(here.nodes[rank // here.local_world], []).append(found)
    measured = {node: _slowest(speeds) for node, speeds in by_node.items()}
    for what, speeds in (
        ("inside a node", [speed.inside for speed in measured.values()]),
        ("to the next node", [speed.between for speed in measured.values()]),
        ("all together", [mine.world]),
    ):
        known = [speed for speed in speeds if speed is not None]
        if known:
            print(f"preflight: {what} {min(known):.2f} to {max(known):.2f} GB/s per rank", flush=True)
    return slow_nodes(measured, config.slurm.min_gb_per_s)


def _slowest(speeds: Sequence[Bandwidth]) -> Bandwidth:
    def least(values: list[float | None]) -> float | None:
        return min((value for value in values if value is not None), default=None)

    return Bandwidth(
        least([speed.inside for speed in speeds]),
        least([speed.between for speed in speeds]),
        least([speed.world for speed in speeds]),
    )


def _leave(store: dist.Store, here: Process) -> None:
    """Leave the store. Rank 0 owns it, so it leaves last, or after ten seconds."""
    try:
        if here.rank:
            store.add("left", 1)
            return
        deadline, others = time.monotonic() + 10, store.add("reported", 0)
        while store.add("left", 0) < others and time.monotonic() < deadline:
            time.sleep(0.05)
    except RuntimeError:
        pass
