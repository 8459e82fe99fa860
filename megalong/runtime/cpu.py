"""Run Megatron-Core on a CPU: redirect its CUDA calls to the CPU.

Megatron-Core gets its device in three ways: `torch.cuda.current_device()`, the literal `device="cuda"` in tensor
factories, and `Tensor.cuda()`. It recognizes parameters by the string `torch.cuda.FloatTensor`, and it keeps a "CUDA"
random state per tensor-parallel rank. On a machine without a GPU each of these has one sensible answer, so the same
unmodified training code runs on gloo, and a test on a laptop tests what runs on a cluster.

The trade-off: this is monkey-patching. It is therefore all in this file, is installed only when no GPU is in use, is
idempotent, and is logged. Other libraries in the process (transformers, lm-eval) see torch unpatched: calls from
outside Megatron-Core and megalong reach torch unchanged, except for device queries, which have no answer without a GPU.
Factories are wrapped one by one and not through a `TorchFunctionMode`, because a mode costs a Python call on *every*
torch operation, a wrapper only on these few. torch's own modes and compilers do not recognize a wrapper, so it is
registered with them too (`_patch_factories`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("megalong")

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_installed = False
# Ranks of a group -> the world it belongs to, and the group (or torch's marker for ranks outside it).
_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}


def install() -> None:
    """Route Megatron-Core's CUDA calls to the CPU; does nothing the second time."""
    global _installed
    if _installed:
        return
    _patch_lone_collectives()
    _import_without_compiling()
    _patch_device_queries()
    _patch_factories()
    _patch_tensor_methods()
    _patch_random_state()
    _share_equal_groups()
    _installed = True
    log.info("no GPU in use: running Megatron-Core's CUDA calls on the CPU (runtime/cpu.py)")


def _patch_lone_collectives() -> None:
    """Skip in-place gathers and scatters in a group of one rank; gloo would copy the buffer twice.

    Must run before Megatron-Core is imported, because it copies these functions from torch.
    """
    module: Any = dist
    module.all_gather_into_tensor = _unless_alone(dist.all_gather_into_tensor)
    module.reduce_scatter_tensor = _unless_alone(dist.reduce_scatter_tensor)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def called(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group, waited_for = kwargs.get("group"), not kwargs.get("async_op", False)
        if waited_for and not args and output.data_ptr() == input.data_ptr() and dist.get_world_size(group) == 1:
            return None
        return collective(output, input, *args, **kwargs)

    return called


def _import_without_compiling() -> None:
    """Import Megatron-Core with its `torch.compile` decorators off: on a CPU they cost seconds and bring nothing."""
    compiler: Any = torch.compile
    module: Any = torch
    module.compile = lambda function: function
    try:
        import megatron.core  # noqa: F401
    finally:
        module.compile = compiler


def _patch_device_queries() -> None:
    """`current_device()` returns the CPU; synchronization and profiler ranges do nothing."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.manual_seed = _for_megatron(cuda.manual_seed, lambda seed: torch.manual_seed(seed))
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    # One function each: torch.compile has a table of these and refuses one object under two names.
    for owner, name in ((cuda, "set_device"), (cuda, "synchronize"), (cuda, "empty_cache"),
                        (cuda.nvtx, "range_push"), (cuda.nvtx, "range_pop")):  # fmt: skip
        setattr(owner, name, lambda *args, **kwargs: None)


def _patch_factories() -> None:
    """`torch.zeros(..., device="cuda")` and similar factories return CPU tensors."""
    with torch.device("meta"):  # the first use determines which functions a device context covers
        torch.empty(0)
    module: Any = torch
    for name in _FACTORIES:
        wrapped = _on_cpu(getattr(torch, name))
        setattr(module, name, wrapped)
        torch.jit._builtins._register_builtin(wrapped, f"aten::{name}")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling() and _asks_for_cuda(sys._getframe(1)):
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return made


def _asks_for_cuda(frame: FrameType) -> bool:
    """Whether the caller is Megatron-Core or megalong, whose CUDA calls go to the CPU."""
    return frame.f_globals.get("__name__", "").startswith(("megatron.", "megalong."))


def _for_megatron(plain: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer` for Megatron-Core and megalong, `plain` for all other callers."""

    @functools.wraps(plain)
    def asked(*args: Any, **kwargs: Any) -> Any:
        return (answer if _asks_for_cuda(sys._getframe(1)) else plain)(*args, **kwargs)

    return asked


def _patch_tensor_methods() -> None:
    """`Tensor.cuda()` returns the tensor; only Megatron-Core sees a CUDA type for a CPU tensor."""
    plain_type = torch.Tensor.type

    def megatron_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and asked_by.startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor: Any = torch.Tensor
    tensor.cuda = _for_megatron(torch.Tensor.cuda, lambda self, *args, **kwargs: self)
    tensor.type = megatron_type
    module: Any = torch.nn.Module
    module.cuda = _for_megatron(torch.nn.Module.cuda, lambda self, device=None: self)


def _patch_random_state() -> None:
    """The tracker of tensor-parallel random states uses the CPU generator."""
    cuda: Any = torch.cuda
    for owner in (cuda, cuda.random):
        owner.get_rng_state = _for_megatron(owner.get_rng_state, lambda device=None: torch.get_rng_state())
        owner.set_rng_state = _for_megatron(owner.set_rng_state, lambda state, device=None: torch.set_rng_state(state))

    from megatron.core.tensor_parallel import random as megatron_random

    patched: Any = megatron_random
    patched._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _share_equal_groups() -> None:
    """Use one process group for all groups of the same ranks.

    Megatron-Core makes about fifty groups for a grid, most of them of ranks that already have a group. Each gloo group
    has two threads that wake a hundred times a second: on two cores they would cost more than training. Sharing is safe
    because every rank issues the operations of a grid in the same order. All ranks take part in making a group, so
    ranks outside it cache it too.
    """
    new_group = dist.new_group

    @functools.wraps(new_group)
    def shared(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        key = tuple(ranks) if ranks is not None else tuple(range(dist.get_world_size()))
        world, group = _groups.get(key, (None, None))
        if world is not dist.group.WORLD:
            group = new_group(ranks, *args, **kwargs)
            _groups[key] = (dist.group.WORLD, group)
        return group

    module: Any = dist
    module.new_group = shared


def forget_groups() -> None:
    """Clear the cache of groups; call when a grid's groups are destroyed."""
    _groups.clear()


def _ignore(*args: Any, **kwargs: Any) -> None:
    """A no-op: the CPU never has pending work."""


class _Stream:
    """A stream without pending work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    wait_stream = wait_event = synchronize = _ignore

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    """An event on such a stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = _ignore

    def query(self) -> bool:
        return True
