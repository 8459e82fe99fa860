"""The device's peak FLOP/s, for MFU, and the peak memory of the run.

MFU divides the operations a model needs by the peak of the device. For known GPUs the peak is the vendor's dense bf16
figure (costs/hardware.py). For anything else (a CPU, a GPU not in the table) it is measured once, in a quarter of a
second: the best of a few square matrix products. On a CPU they are timed in CPU seconds, so that another program on the
same cores does not lower the peak. A measured peak is what the machine can truly reach, so MFU against it is higher
than against a data sheet; the run's `config` text in TensorBoard says which one was used.
"""

from __future__ import annotations

import resource
import time

import torch

from megalong.costs.hardware import Peak, data_sheet_peak


def device_peak(device: torch.device) -> Peak:
    """The peak of `device` for MFU: from the data sheet if its name is known, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        measured = f"{name}, bf16 matrix product measured"
        return data_sheet_peak(name) or Peak(_measure(device, torch.bfloat16, 8192), measured)
    return Peak(_measure(device, torch.float32, 1024), "this CPU process, fp32 matrix product measured")


def _measure(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left = torch.randn(size, size, device=device).to(dtype)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    seconds = []
    for _ in range(6):
        _synchronize(device)
        started = clock()
        left @ left
        _synchronize(device)
        seconds.append(clock() - started)
    return 2 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: the CUDA allocator's peak, on CPU the largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
