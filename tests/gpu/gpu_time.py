"""What a GPU spent its time on during some work, and how long it had nothing to do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Parts of kernels' names, looked for in this order.
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "matmul", "aten::mm"),
    "softmax and loss": ("softmax", "cross_entropy", "log_softmax"),
    "copies and sums": ("memcpy", "memset", "copy", "cat", "add", "reduce"),
}


@dataclass(frozen=True)
class Profile:
    """Seconds of every kernel by name (of CPU operators in a rehearsal), of the work, and of an idle GPU in it."""

    kernels: Counter[str]
    wall: float
    idle: float | None

    def top(self, count: int) -> list[str]:
        """The kernels that took longest: share of all of them, and name."""
        total = sum(self.kernels.values())
        return [f"{seconds / total:.1%} {name[:90]}" for name, seconds in self.kernels.most_common(count)]

    def shares(self) -> dict[str, float]:
        """Of `KINDS`, and of the rest."""
        total, found = sum(self.kernels.values()), Counter[str]()
        for name, seconds in self.kernels.items():
            low = name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in low for part in parts)), "rest")
            found[kind] += seconds / total
        return {kind: round(share, 3) for kind, share in found.most_common()}


def profiled(work: Callable[[], Any], device: torch.device) -> Profile:
    """Profile one call of `work`."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - started
    events = [event for event in found.events() if not getattr(event, "is_user_annotation", False)]
    if not on_gpu:
        return Profile(_by_name((event.name, event.self_cpu_time_total) for event in events), wall, None)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    return Profile(
        _by_name((event.name, event.time_range.elapsed_us()) for event in kernels), wall, wall - busy(spans) / 1e6
    )


def _by_name(times: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, microseconds in times:
        found[name] += microseconds / 1e6
    return found


def busy(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
