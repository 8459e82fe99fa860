"""Judge the reports of all ranks: one line per node that is silent, faulty, slow, too small, or unlike the others.

Nothing here measures or communicates, so every rule is tested with made-up nodes. A node that differs from most is
named; of two nodes that differ, both are.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from megalong.checkpoint.folder import read_meta, whole_checkpoints
from megalong.config.architecture import Architecture
from megalong.config.schema import Config
from megalong.costs.flops import matrix_entries
from megalong.errors import UserError
from megalong.runtime.bandwidth import Bandwidth
from megalong.runtime.node_report import NodeReport
from megalong.training.first_lines import parameter_count

_SLOW = 0.5  # of the others' median
_GIB = 2**30


def silent_nodes(reports: Mapping[int, NodeReport], world: int, names: Sequence[str], wait: float) -> list[str]:
    """Nodes with a rank that has not reported, by SLURM's names."""
    per_node = world // max(1, len(names))
    silent: dict[str, list[int]] = {}
    for rank in range(world):
        if rank not in reports:
            silent.setdefault(names[rank // per_node], []).append(rank)
    return [f"node {name}: no answer from rank {_ranks(ranks)} within {wait:g} s" for name, ranks in silent.items()]


def node_faults(reports: Sequence[NodeReport]) -> list[str]:
    """One line for each node that reports a fault, has other versions than most, or computes more slowly than most."""
    faults: dict[str, list[str]] = {}
    for report in reports:
        faults.setdefault(report.node, []).extend(report.faults)
    _odd_versions(reports, faults)
    # A CPU's probe takes microseconds and shares its cores; GPUs of one kind are within a few percent of each other.
    timed = [report for report in reports if report.gpus is not None and report.probe_seconds]
    usual = median(report.probe_seconds for report in timed) if timed else 0.0
    for report in timed:
        if report.probe_seconds > usual / _SLOW:
            times = report.probe_seconds / usual
            faults[report.node].append(f"rank {report.rank}'s GPU takes {times:.1f} x the median time of a product")
    return [f"node {node}: {'; '.join(dict.fromkeys(found))}" for node, found in faults.items() if found]


def _odd_versions(reports: Sequence[NodeReport], faults: dict[str, list[str]]) -> None:
    by_node = {report.node: report.versions for report in reports}
    for name in sorted({name for versions in by_node.values() for name in versions}):
        found = {node: versions.get(name, "-") for node, versions in by_node.items()}
        usual, count = Counter(found.values()).most_common(1)[0]
        for node, version in found.items():
            if version != usual or 2 * count == len(found):
                others = sorted({other for other in found.values() if other != version})
                if others:
                    faults[node].append(f"{name} {version}, on other nodes {', '.join(others)}")


def slow_nodes(measured: Mapping[str, Bandwidth], minimum: float | None) -> list[str]:
    """Nodes whose GPUs, or whose network, are half as fast as the others', or slower than `minimum` GB/s.

    Args:
        measured: the speed of each node's slowest rank.
    """
    lines = []
    for what, speeds in (
        ("between its GPUs", {node: speed.inside for node, speed in measured.items()}),
        ("to its neighbours", {node: speed.between for node, speed in measured.items()}),
    ):
        known = {node: speed for node, speed in speeds.items() if speed is not None}
        usual = median(known.values()) if known else 0.0
        for node, speed in known.items():
            line = f"node {node}: {speed:.2f} GB/s {what}"
            if minimum is not None and speed < minimum:
                lines.append(f"{line}, below slurm.min_gb_per_s {minimum:g}")
            elif len(known) > 2 and speed < _SLOW * usual:
                lines.append(f"{line}, the median is {usual:.2f}")
    return lines


def checkpoint_bytes(config: Config, architecture: Architecture) -> int:
    """Bytes of one checkpoint: those of the run's newest if there is one, else of weights and optimizer state."""
    own = whole_checkpoints(Path(config.run.dir))
    if own:
        files = read_meta(own[-1]).files
        if files:
            return sum(files.values())
    weight = 2 if config.precision.params_dtype == "bf16" else 4
    trained = 0 if config.lora.rank is not None else 12  # fp32 master, first and second moment
    return parameter_count(architecture) * (weight + trained)


def disk_fault(config: Config, architecture: Architecture, node: str) -> str | None:
    """A line if the disk has no room for the checkpoints to keep and the one being written, else None."""
    run = Path(config.run.dir)
    one, existing = checkpoint_bytes(config, architecture), len(whole_checkpoints(run))
    missing = max(1, config.checkpoint.keep_last + 1 - existing)
    folder = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free >= missing * one:
        return None
    return (
        f"node {node}: {free / _GIB:.1f} GiB free in {folder}, but the run will write {missing} more checkpoints of "
        f"{one / _GIB:.1f} GiB: free some space, or lower checkpoint.keep_last {config.checkpoint.keep_last}"
    )


def state_bytes(config: Config, architecture: Architecture, world: int) -> float:
    """Bytes of weights, gradients and optimizer state on a rank, the minimum; activations come on top."""
    parallel = config.parallel
    cut = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    entries = matrix_entries(architecture) / cut
    bf16 = config.precision.params_dtype == "bf16"
    if config.lora.rank is not None:
        return entries * (2 if bf16 else 4)
    copies = config.data_parallel_size(world) * parallel.context_parallel_size
    optimizer = (12 if bf16 else 8) / (copies if parallel.use_distributed_optimizer else 1)
    return entries * ((2 if bf16 else 4) + 4 + optimizer)


def memory_faults(config: Config, architecture: Architecture, reports: Sequence[NodeReport], world: int) -> list[str]:
    """Nodes whose GPUs (or memory) cannot hold weights, gradients and optimizer state alone.

    Raises:
        UserError: they fit on no node, so the grid is wrong, not a node.
    """
    need = state_bytes(config, architecture, world)
    ranks = Counter(report.node for report in reports)
    small: dict[str, float] = {}
    for report in reports:
        share = report.memory / (1 if report.gpus is not None else ranks[report.node])
        if share and share < need:
            small[report.node] = share
    needs = f"weights, gradients and optimizer state of a rank take {need / _GIB:.1f} GiB"
    if small and len(small) == len(ranks):
        raise UserError(
            f"{needs}, and the nodes have {max(small.values()) / _GIB:.1f} GiB for each: raise "
            "parallel.tensor_model_parallel_size or pipeline_model_parallel_size, or use more nodes"
        )
    return [f"node {node}: {share / _GIB:.1f} GiB for a rank, but {needs}" for node, share in small.items()]


def _ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
