"""This process's device, rank and process groups (grid.py defines which ranks share a group).

A process started by torchrun (or by `--nproc`) finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its
environment; a process started by hand is a world of one.
"""

from __future__ import annotations

import datetime
import gc
import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalong.errors import UserError
from megalong.runtime import cpu, gpus, megatron, peers, signals
from megalong.runtime.grid import ORDER, Grid, Place
from megalong.runtime.rendezvous import store_of_this_life

# The world's timeout, for groups created later.
_timeout = datetime.timedelta(minutes=60)
_control: dist.ProcessGroup | None = None
# The group, and the world it belongs to.
_background: tuple[Any, dist.ProcessGroup | None] = (None, None)
_context_levels: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)


def grid() -> Grid:
    """The grid from `set_grid`, without `heads`."""
    from megatron.core import parallel_state

    return Grid(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def place() -> Place:
    """This rank's place in the grid."""
    return grid().place(dist.get_rank(), dist.get_world_size())


def environment_world() -> tuple[int, int]:
    """(rank, world size) from the environment of torchrun or `--nproc`, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(wanted: str = "auto") -> torch.device:
    """`cuda:LOCAL_RANK`, or the CPU if no GPU is wanted or available.

    Raises:
        UserError: `runtime.device: cuda` although torch sees no GPU here, or more processes here than GPUs.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("runtime.device: 'cuda', but torch sees no GPU here; write 'auto' or 'cpu'")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    gpus.refuse_more_processes()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(device: torch.device, timeout_minutes: float = 60) -> None:
    """Join the world (NCCL on GPUs, gloo on CPUs) and make Megatron-Core usable.

    Args:
        timeout_minutes: how long a collective may wait. The first step of a 4M-token run takes longer than torch's
            default of ten minutes.
    """
    global _timeout
    if "RANK" in os.environ:
        signals.end_at_interrupt()  # a rank blocked in a collective would never raise the exception
    gpus.set_environment()
    # Before Transformer Engine is imported, and before NCCL or anything else can open a context on GPU 0.
    gpus.use(device)
    megatron.prepare(device)
    _timeout = timeout = datetime.timedelta(minutes=timeout_minutes)
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, world = _rendezvous(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = store_of_this_life(store, rank, world, timeout)
        store.set_timeout(timeout)
        peers.join(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _rendezvous(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The store at MASTER_ADDR and MASTER_PORT, this rank, and the world size.

    Raises:
        UserError: rank 0 cannot open the port, or this rank cannot reach it.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        reason = " ".join(str(error).split())
        if "EADDRINUSE" in reason:
            raise UserError(
                f"MASTER_PORT {port} of this host is in use by another process, perhaps a run that is still ending; "
                "choose another port (torchrun --master-port P, or MASTER_PORT=P)",
                speaker="rank",
            ) from None
        raise UserError(
            f"rank {os.environ['RANK']} cannot reach rank 0 at {address}:{port} (MASTER_ADDR, MASTER_PORT): "
            f"{reason.partition('. ')[0].rstrip('.')}; start rank 0, or check the name and the network",
            speaker="node",
        ) from None
    return store, rank, world


def set_grid(grid: Grid, seed: int = 1234, timeout_minutes: float = 60) -> None:
    """Build the groups of `grid` and seed every generator.

    Raises:
        UserError: the world is not a multiple of TP × CP × PP.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    world = dist.get_world_size()
    if world % grid.model_parallel_size:
        raise UserError(
            f"{world} processes cannot be split into TP {grid.tensor} × CP {grid.context} × PP {grid.pipeline} "
            f"= {grid.model_parallel_size}; start a multiple of {grid.model_parallel_size}"
        )
    clear_grid()
    if gc.get_freeze_count():
        free_cycles()  # also those of an earlier world
    else:
        gc.collect()
        # About 300,000 objects of imported modules: without them, a later collection takes milliseconds, not 0.2 s.
        gc.freeze()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=grid.virtual if grid.virtual > 1 else None,
        context_parallel_size=grid.context,
        order=ORDER,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        # Only the NCCL world needs a second, CPU-side set of groups for checkpointing.
        create_gloo_process_groups=dist.get_backend() == "nccl",
    )
    _make_context_levels(grid, datetime.timedelta(minutes=timeout_minutes))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def replica_of(rank: int) -> int:
    """The data-parallel rank of a rank of the world."""
    return grid().place(rank, dist.get_world_size()).data


def context_levels() -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The two levels of this rank's context-parallel group; None for a level with one rank.

    Neighbouring ranks that share heads, and ranks with the same index in their neighbourhoods, which exchange keys.
    """
    return _context_levels


def _make_context_levels(grid: Grid, timeout: datetime.timedelta) -> None:
    """Split every context-parallel group into two levels; all ranks of the world take part in making each group."""
    global _context_levels
    from megatron.core import parallel_state

    whole = parallel_state.get_context_parallel_group() if grid.context > 1 else None
    if grid.heads in (1, grid.context):
        _context_levels = (None, whole) if grid.heads == 1 else (whole, None)
        return
    span, rank = grid.tensor * grid.context, dist.get_rank()
    mine: dict[str, dist.ProcessGroup] = {}
    for first in (base + tensor for base in range(0, dist.get_world_size(), span) for tensor in range(grid.tensor)):
        ranks = [first + grid.tensor * place for place in range(grid.context)]
        near = [ranks[i : i + grid.heads] for i in range(0, grid.context, grid.heads)]
        far = [ranks[i :: grid.heads] for i in range(grid.heads)]
        for level, members in [*(("near", one) for one in near), *(("far", one) for one in far)]:
            group = dist.new_group(members, timeout=timeout)
            if rank in members:
                mine[level] = group
    _context_levels = mine["near"], mine["far"]


def from_all_ranks(mine: Sequence[float]) -> list[list[float]]:
    """All-gather these numbers: one list per rank, rank 0 first."""
    own = torch.tensor(mine, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return [[float(one) for one in part] for part in torch.stack(parts).tolist()]


def control_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for messages that must not wait for a GPU; None means the world group.

    The first call creates it; all ranks must make that call together.
    """
    global _control
    if dist.get_backend() != "nccl":
        return None
    if _control is None:
        # Without `timeout`, gloo's default of 30 minutes would apply instead of the world's.
        _control = dist.new_group(backend="gloo", timeout=_timeout)
    return _control


def background_group(timeout_minutes: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for one background thread; all ranks must call this together.

    Always a separate group: two threads in one group would receive each other's messages.
    """
    global _background
    world, group = _background
    if world is not dist.group.WORLD:
        # On CPUs, cpu.py would return an existing group of the same ranks.
        new_group = getattr(dist.new_group, "__wrapped__", dist.new_group)
        group = new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
        _background = dist.group.WORLD, group
    return group


def free_cycles() -> None:
    """Free models that are no longer used, and the groups that they reference.

    They are in reference cycles through autograd's nodes: what one collection frees lets the next free more.
    """
    for _ in range(3):
        gc.collect()


def clear_grid() -> None:
    """Close the groups of the last grid, if there was one.

    Megatron-Core closes only the gloo groups that it made beside NCCL's. It drops the others, which would keep their
    threads and sockets, or their communicators, for the life of the process. Closing a communicator may wait for its
    other ranks, so all ranks close them in the same order, the newest first.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    global _context_levels
    groups = dict.fromkeys([*(parallel_state._global_process_group_list or []), *_context_levels])
    _context_levels = (None, None)
    parallel_state.destroy_model_parallel()
    cpu.forget_groups()
    free_cycles()
    for group in reversed(groups):
        if group is not dist.group.WORLD and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def stop() -> None:
    """Destroy all process groups and restore the signal handlers."""
    global _control, _background
    _control, _background = None, (None, None)
    peers.leave()
    if dist.is_initialized():
        clear_grid()
        dist.destroy_process_group()
    signals.restore_handlers()


def is_main_rank() -> bool:
    """Whether this is rank 0, which logs and writes for all ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0
