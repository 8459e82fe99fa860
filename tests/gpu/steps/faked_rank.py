"""One rank of tensor parallelism 8 of a Llama 3.1 8B, in a world whose other seven ranks do not exist.

The rank's own work and memory are real: its slices of 4 layers, of the embedding and of the head, sequence
parallelism, recomputation, optimizer. **Collectives are faked**: they take no time on a network, and what they should
bring is this rank's own data. So losses mean nothing, and tokens/s is what is left for a network that costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.gpu.device import GIB, forget_peak, median_time
from benchmarks.gpu.rows import SIZES

from megalong.config.architecture import Architecture
from megalong.costs.flops import flops_per_token
from megalong.training.hardware import device_peak, peak_memory
from tests.gpu.gpu_time import profiled
from tests.gpu.harness import Trial

TENSOR = 8


def run(trial: Trial) -> None:
    """Steps, their memory, and a profile of one."""
    join_faked_world(TENSOR)
    from benchmarks.gpu.ours import OurTraining

    tokens = trial.size(1 << 18, 256)
    shape = Architecture.model_validate(_shape(trial.rehearse))
    training = OurTraining(
        shape, trial.device, parallel={"tensor_model_parallel_size": TENSOR, "sequence_parallel": True}
    )
    trial.figure("collectives", f"faked: 1 of {TENSOR} ranks is real")
    trial.figure("weights of the rank, GiB", _allocated(trial))
    loss = training.step(tokens)
    trial.check("the loss is finite", loss == loss and abs(loss) < 1e6, str(loss))
    forget_peak(trial.device)
    took = median_time(lambda: training.step(tokens), trial.device, 0.0 if trial.rehearse else 8.0, warm_up=False)
    flops = flops_per_token(shape, tokens) * tokens / TENSOR / took
    mfu = flops / device_peak(trial.device).flops_per_second
    found = {"s a step": took, "tokens/s": tokens / took, "TFLOP/s": flops / 1e12, "MFU": mfu,
             "peak GiB": peak_memory(trial.device) / GIB}  # fmt: skip
    for name, value in found.items():
        trial.figure(name, None if trial.rehearse else value, headline=True)
    profile = profiled(lambda: training.step(tokens), trial.device)
    trial.figure("shares of the GPU's time", profile.shares(), headline=True)
    trial.figure("idle share", None if profile.idle is None else profile.idle / profile.wall, headline=True)
    for place, line in enumerate(profile.top(15), 1):
        trial.figure(f"kernel {place}", line)
    training.close()


def run_plain(trial: Trial) -> None:
    """The same where Transformer Engine and apex are not installed."""
    from megalong.runtime.megatron import hide_gpu_packages

    hide_gpu_packages("to be measured")
    run(trial)


def _shape(rehearse: bool) -> dict[str, Any]:
    if rehearse:
        return {**SIZES["tiny"], "num_attention_heads": 8, "num_query_groups": 8, "vocab_size": 1024}
    return {**SIZES["8b_eighth"], "vocab_size": 128256}


def _allocated(trial: Trial) -> float | None:
    return torch.cuda.memory_allocated(trial.device) / GIB if trial.device.type == "cuda" else None


def join_faked_world(ranks: int) -> None:
    """Make this process rank 0 of `ranks`: before Megatron-Core is imported, which takes collectives from torch."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    module: Any = dist
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(module, name):
            setattr(module, name, _with_own_part(getattr(module, name)))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def _with_own_part(scatter: Callable[..., Any]) -> Callable[..., Any]:
    """torch's faked gathers hand out this rank's data, and its faked scatters nothing, which may be NaN."""

    @functools.wraps(scatter)
    def called(output: torch.Tensor, input: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        work = scatter(output, input, *arguments, **options)
        own = input.flatten()[: output.numel()].view_as(output)
        if own.data_ptr() != output.data_ptr():
            output.copy_(own)
        return work

    return called
