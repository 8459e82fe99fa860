"""What a GPU does with this product: whole training steps beside `transformers`, and attention beside the chip's rate.

    python tools/benchmark.py gpu [--quick] [--rows PATTERN…] [--skip PATTERN…] [--seconds N] [--list] [--json] [--tiny]

Rows, by the names that patterns match (`1b/*`, `*/256k/*`, `*/fp8`):

    SIZE/LENGTH/SIDE/PRECISION   training steps: 1b (Llama 3.2 1B) and 8b_eighth (an eighth of Llama 3.1 8B: 4 layers,
                                 16,032 tokens of the vocabulary) at 8k, 32k, 128k and 256k, by ours in bf16 and fp8
                                 (linear layers, by Transformer Engine) and by transformers in bf16, all with
                                 activations recomputed layer by layer; a step has 32K tokens at least
    attention/LENGTH/SIDE        forward and backward in bf16 at 32k, 128k and 512k: 32 query and 8 key heads of 128
                                 channels; from 256k on 4 and 1, a TP 8 rank's

    ours          attention: the kernel `attention.backend: auto` takes
    flash         FlashAttention-2 as built into torch, through our blocks
    sdpa          torch.nn.functional.scaled_dot_product_attention, torch's own choice
    te, te_fp8    Transformer Engine in bf16, and in FP8 with delayed scaling
    documents     ours over log-normal documents of about 4,000 tokens, counted by the pairs they attend

Figures:

    matmul_tflops                                the chip's rate, measured with products of 8192 x 8192 bf16 matrices
    SIZE_LENGTH_SIDE_PRECISION_tokens_per_s
    SIZE_LENGTH_SIDE_PRECISION_tflops            model FLOPs (training/flops.py): the causal half, nothing recomputed
    SIZE_LENGTH_SIDE_PRECISION_mfu               over the data sheet's dense bf16 rate (training/hardware.py), FP8's too
    SIZE_LENGTH_SIDE_PRECISION_peak_gib          what the allocator had handed out at most
    SIZE_LENGTH_SIDE_PRECISION_step_s
    SIZE_LENGTH_SIDE_PRECISION_out_of_memory     1, in place of the others
    SIZE_LENGTH_PRECISION_ratio_vs_transformers  tokens/s of ours, in bf16 or fp8, over those of transformers in bf16
    SIDE_tflops_LENGTH                           of attention

Rows of one model share a process of their own, shortest first. A row that no longer fits into the budget by its
estimate is left out by name, and one that fails says why; steps of over ten seconds are timed the first time. `--quick`
leaves out the longest rows and takes eight minutes at most. `--tiny` tries the code on a CPU; its figures say nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from benchmarks import Report
from benchmarks.gpu.child import TIMED_OUT, Line, python, run_child
from benchmarks.gpu.rows import QUICK_SECONDS, START_SECONDS, Choice, Row, chosen, estimate
from megalong.runtime.gpus import missing_settings

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 3.0  # times its estimate that a group may take before it is killed


def run(options: Namespace) -> Report:
    """Measure the rows that are asked for; their progress goes to stderr."""
    choice = Choice(options.quick, options.rows or ["*"], options.skip or (), options.tiny)
    rows = chosen(choice)
    if not rows:
        raise SystemExit("benchmark gpu: no row has such a name; --list shows them")
    if options.list:
        lines = [f"{row.seconds():6.0f} s  {row.name}" for row in rows]
        return Report({}, "\n".join([*lines, f"{estimate(rows):6.0f} s  in all, with {START_SECONDS:.0f} a process"]))
    if not options.tiny:
        _check_gpu()
    budget = options.seconds or (QUICK_SECONDS if options.quick else float("inf"))
    results = Results("cpu" if options.tiny else "cuda", time.monotonic() + budget)
    for _, group in groupby(rows, lambda row: row.group):
        results.measure(list(group))
    return Report(results.figures(), results.table(rows))


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmark gpu: torch sees no GPU here; run it on a machine that has one")


class Results:
    """What the groups' processes have reported."""

    def __init__(self, device: str, deadline: float) -> None:
        self.device, self.deadline = device, deadline
        self.name, self.matmul = "", 0.0
        self.lines: dict[str, Line] = {}

    def measure(self, rows: list[Row]) -> None:
        """Run a group's process; rows that it left unsaid get a line that says what became of it."""
        left = self.deadline - time.monotonic()
        if left < START_SECONDS:
            self._unsaid(rows, {"skipped": "the budget is spent"})
            return
        limit = min(left, PATIENCE * estimate(rows))
        task = {"rows": [astuple(row) for row in rows], "seconds": limit - START_SECONDS / 2, "device": self.device}
        command = python(["-m", "benchmarks.gpu.worker", json.dumps(task)])
        output: IO[Any] = sys.stderr
        status = run_child(command, limit, self._take, output, _environment())
        if status == TIMED_OUT:
            self._unsaid(rows, {"failed": f"no answer within {limit:.0f} s"})
        self._unsaid(rows, {"failed": f"its process ended with status {status}"})

    def _take(self, line: Line) -> None:
        if "matmul" in line:
            self.name, self.matmul = line["device"], self.matmul or line["matmul"]
            return
        self.lines[line["row"]] = line
        print(f"{line['row']:32}{_outcome(line, self.matmul)}", file=sys.stderr, flush=True)

    def _unsaid(self, rows: list[Row], what: Line) -> None:
        for row in rows:
            if row.name not in self.lines:
                self._take({"row": row.name, **what})

    def figures(self) -> dict[str, float]:
        """By the names that the package documents."""
        found: dict[str, float] = {"matmul_tflops": _rounded(self.matmul / 1e12)}
        for name, line in self.lines.items():
            row = Row(*name.split("/"))
            for key, value in line.get("figures", {}).items():
                found[f"{row.side}_{key}_{row.length}" if row.is_attention else f"{row.figure}_{key}"] = _rounded(value)
            if line.get("out_of_memory"):
                found[f"{row.figure}_out_of_memory"] = 1
        return found | _ratios(found)

    def table(self, rows: list[Row]) -> str:
        """A line for each row, in the order of `rows`."""
        head = f"{self.name}, matrix product {self.matmul / 1e12:.0f} TFLOP/s"
        lines = [f"{row.name:32}{_outcome(self.lines[row.name], self.matmul)}" for row in rows]
        return "\n".join([head, f"{'':32}{_HEAD}", *lines])


_HEAD = f"{'tokens/s':>10} {'TFLOP/s':>8} {'of matmul':>9} {'MFU':>6} {'GiB':>6} {'s/step':>7}"


def _outcome(line: Line, matmul: float) -> str:
    found = line.get("figures")
    if found is None:
        return f"skipped: {line['skipped']}" if "skipped" in line else f"failed: {line['failed']}"
    rate = found["tflops"] * 1e12
    shown = f"{'' if 'tokens_per_s' not in found else format(found['tokens_per_s'], ',.0f'):>10} "
    shown += f"{rate / 1e12:8.1f} {rate / matmul if matmul else 0:9.0%}"
    if "mfu" in found:
        shown += f" {found['mfu']:6.1%} {found['peak_gib']:6.1f} {found['step_s']:7.2f}"
    return shown


def _ratios(figures: dict[str, float]) -> dict[str, float]:
    found = {}
    for name, rate in figures.items():
        if "_ours_" not in name or not name.endswith("_tokens_per_s"):
            continue
        place, precision = name.removesuffix("_tokens_per_s").split("_ours_")
        theirs = figures.get(f"{place}_transformers_bf16_tokens_per_s")
        if theirs:
            found[f"{place}_{precision}_ratio_vs_transformers"] = _rounded(rate / theirs)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**missing_settings(os.environ), **os.environ, "PYTHONPATH": path}
