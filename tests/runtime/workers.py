"""What ranks of the pool run for the tests of `runtime`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megalong.runtime import distributed
from megalong.runtime.grid import Grid


def close_layouts_of_a_gpu_world() -> list[str]:
    """Names of the groups this rank closes, in order, where a layout has gloo groups beside the world's as on NCCL.

    A stage with tensor parallelism, one with context parallelism, and the end of the run.
    """
    distributed.start(torch.device("cpu"))
    from megatron.core import parallel_state

    closed: list[str] = []
    build, close, share = parallel_state.initialize_model_parallel, dist.destroy_process_group, dist.new_group

    def build_with_gloo(**settings: object) -> None:
        build(**{**settings, "create_gloo_process_groups": True})

    def note_and_close(group: dist.ProcessGroup | None = None) -> None:
        closed.append(group.group_name if group is not None else "the world")
        close(group)

    # A group each, as on GPUs: on CPUs groups of equal ranks are one (runtime/cpu.py).
    dist.new_group = share.__wrapped__
    parallel_state.initialize_model_parallel, dist.destroy_process_group = build_with_gloo, note_and_close
    try:
        distributed.set_grid(Grid(tensor=2))
        distributed.set_grid(Grid(context=2))
        distributed.clear_grid()
        closed += [f"left open: {name}" for name in dist.distributed_c10d._world.pg_names.values()]
        distributed.stop()
    finally:
        dist.new_group, dist.destroy_process_group = share, close
        parallel_state.initialize_model_parallel = build
    return closed


def timeouts_of_a_gpu_world(minutes: float) -> list[tuple[str, float]]:
    """What every group made beside the world's would wait, where gloo groups lie beside the world's as on NCCL."""
    distributed.start(torch.device("cpu"), minutes)
    from megatron.core import parallel_state

    found: list[tuple[str, float]] = []
    build, share, backend = parallel_state.initialize_model_parallel, dist.new_group, dist.get_backend
    kind = "layout"

    def note(*ranks: object, timeout: Any = None, **settings: Any) -> Any:
        group = share.__wrapped__(*ranks, timeout=timeout, **settings)
        minutes = timeout.total_seconds() / 60 if timeout is not None else 30.0
        found.append((settings.get("group_desc") or kind, minutes))
        return group

    def build_with_gloo(**settings: Any) -> None:
        build(**{**settings, "create_gloo_process_groups": True})

    note.__wrapped__ = note  # type: ignore[attr-defined]
    dist.new_group = note
    parallel_state.initialize_model_parallel = build_with_gloo
    try:
        distributed.set_grid(Grid(), timeout_minutes=minutes)
        kind = "background"
        distributed.background_group(minutes)
        kind = "control"
        dist.get_backend = lambda group=None: "nccl"
        distributed.control_group()
    finally:
        dist.new_group, dist.get_backend = share, backend
        parallel_state.initialize_model_parallel = build
        distributed.stop()
    return found
