"""The process of one group of rows: one model, or attention. The package starts it and reads its reports.

python -m benchmarks.gpu.worker '{"rows": [[size, length, side, precision], …], "seconds": N, "device": "cuda"}' FD
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.attention import attention_rate
from benchmarks.gpu.child import Line, reporter
from benchmarks.gpu.device import GIB, forget_peak, is_out_of_memory, matmul_rate, median_time
from benchmarks.gpu.ours import OurTraining
from benchmarks.gpu.rows import LONG_STEP, MATMUL, ROW_SECONDS, Row, architecture
from megalong.costs.flops import flops_per_token
from megalong.training.hardware import device_peak, peak_memory


def main(task: str, descriptor: str) -> None:
    """Measure one row after another and report each at once."""
    settings = json.loads(task)
    device = torch.device(settings["device"], 0) if settings["device"] == "cuda" else torch.device("cpu")
    group = Group([Row(*row) for row in settings["rows"]], device, settings["seconds"], reporter(int(descriptor)))
    group.run()


class Group:
    """Rows that share a process, in order of their length, within `seconds` from now."""

    def __init__(self, rows: list[Row], device: torch.device, seconds: float, report: Callable[[Line], None]) -> None:
        self.rows, self.device, self.report = rows, device, report
        self.deadline = time.monotonic() + seconds
        self.seconds = ROW_SECONDS if device.type == "cuda" else 0.0
        self.training: Any = None

    def run(self) -> None:
        """Measure the rows that there is time for; a row that fails reports why, and the next one follows."""
        matmul = matmul_rate(self.device)
        self.report({"device": _name(self.device), "matmul": matmul})
        matmul = matmul if self.device.type == "cuda" else MATMUL  # the rate of tiny rows does not matter
        full = False
        for row in self.rows:
            seconds = row.seconds(matmul)
            if full:
                self.report({"row": row.name, "skipped": "a shorter one ran out of memory"})
                continue
            if seconds > self.deadline - time.monotonic():
                self.report({"row": row.name, "skipped": f"its {seconds:.0f} s no longer fit into the budget"})
                continue
            try:
                figures = self._attention(row) if row.is_attention else self._steps(row, row.once(matmul) <= LONG_STEP)
                self.report({"row": row.name, "figures": figures})
            except Exception as error:
                full = is_out_of_memory(error) and not row.is_attention
                self.report({"row": row.name, "failed": _why(error), "out_of_memory": is_out_of_memory(error)})
            gc.collect()
            if self.device.type == "cuda" and full:
                torch.cuda.empty_cache()

    def _attention(self, row: Row) -> dict[str, float]:
        return {"tflops": attention_rate(row, self.device) / 1e12}

    def _steps(self, row: Row, warm_up: bool) -> dict[str, float]:
        shape, device = architecture(row.size), self.device
        if self.training is None:
            self.training = _training(row, device)
            self.training.step(self.rows[0].tokens)  # loads and compiles what all rows need
        forget_peak(device)
        seconds = median_time(lambda: self.training.step(row.tokens, row.sequences), device, self.seconds, warm_up)
        rate = row.sequences * row.tokens / seconds
        flops = rate * flops_per_token(shape, row.tokens)
        return {
            "tokens_per_s": rate,
            "tflops": flops / 1e12,
            "mfu": flops / device_peak(device).flops_per_second,
            "peak_gib": peak_memory(device) / GIB,
            "step_s": seconds,
        }


def _training(row: Row, device: torch.device) -> Any:
    if row.side == "transformers":
        from benchmarks.gpu.theirs import TheirTraining

        return TheirTraining(architecture(row.size), device)
    precision = {"fp8": "hybrid"} if row.precision == "fp8" else {}
    return OurTraining(architecture(row.size), device, precision=precision)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _why(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:110]}" if lines else type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
