"""Speed on a GPU: whole training steps against `transformers`, and attention against the chip's matmul rate.

    python tools/benchmark.py gpu [--quick] [--rows PATTERN…] [--skip PATTERN…] [--seconds N] [--list] [--json] [--tiny]

Rows, by the names that patterns match (`1b/*`, `*/256k/*`, `*/fp8`):

    SIZE/LENGTH/SIDE/PRECISION   training steps: 1b (Llama 3.2 1B) and 8b_eighth (an eighth of Llama 3.1 8B: 4 layers,
                                 16,032 tokens of the vocabulary) at 8k, 32k, 128k and 256k, by ours in bf16 and fp8
                                 (linear layers, by Transformer Engine) and by transformers in bf16, all with
                                 activations recomputed layer by layer; a step has at least 32K tokens
    attention/LENGTH/SIDE        forward and backward in bf16 at 32k, 128k and 512k: 32 query and 8 key heads of 128
                                 channels; from 256k on 4 and 1, as on a TP 8 rank

    ours          attention: the kernel that `attention.backend: auto` chooses
    flash         torch's FlashAttention-2, through our blocks
    sdpa          torch.nn.functional.scaled_dot_product_attention, with torch's choice of kernel
    te, te_fp8    Transformer Engine in bf16, and in FP8 with delayed scaling
    documents     ours with log-normal documents of about 4,000 tokens; only attended pairs are counted

Figures:

    matmul_tflops                                the chip's rate, measured with products of 8192 x 8192 bf16 matrices
    SIZE_LENGTH_SIDE_PRECISION_tokens_per_s
    SIZE_LENGTH_SIDE_PRECISION_tflops            model FLOPs (costs/flops.py): the causal half, without recomputation
    SIZE_LENGTH_SIDE_PRECISION_mfu               over the data sheet's dense bf16 rate (training/hardware.py), FP8 too
    SIZE_LENGTH_SIDE_PRECISION_peak_gib          peak memory of the allocator
    SIZE_LENGTH_SIDE_PRECISION_step_s
    SIZE_LENGTH_SIDE_PRECISION_out_of_memory     1, instead of the others
    SIZE_LENGTH_PRECISION_ratio_vs_transformers  tokens/s of ours, in bf16 or fp8, over those of transformers in bf16
    SIDE_tflops_LENGTH                           of attention

Rows of one model share a process, shortest first. A row whose estimate no longer fits into the budget is skipped and
named, and a row that fails reports why. Steps of over ten seconds are timed without a warm-up. `--quick` skips the
longest rows and takes at most eight minutes. `--tiny` tries the code on a CPU; its figures mean nothing.
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
PATIENCE = 3.0  # a group is killed after this many times its estimate


def run(options: Namespace) -> Report:
    """Measure the requested rows; progress goes to stderr."""
    choice = Choice(options.quick, options.rows or ["*"], options.skip or (), options.tiny)
    rows = chosen(choice)
    if not rows:
        raise SystemExit("benchmark gpu: no row has such a name; --list shows them")
    if options.list:
        lines = [f"{row.seconds():6.0f} s  {row.name}" for row in rows]
        total = f"{estimate(rows):6.0f} s  in total, with {START_SECONDS:.0f} per process"
        return Report({}, "\n".join([*lines, total]))
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
    """The reports of the groups' processes."""

    def __init__(self, device: str, deadline: float) -> None:
        self.device, self.deadline = device, deadline
        self.name, self.matmul = "", 0.0
        self.lines: dict[str, Line] = {}

    def measure(self, rows: list[Row]) -> None:
        """Run a group's process; rows that it did not report get a line with the reason."""
        left = self.deadline - time.monotonic()
        if left < START_SECONDS:
            self._add_missing(rows, {"skipped": "the budget is spent"})
            return
        limit = min(left, PATIENCE * estimate(rows))
        task = {"rows": [astuple(row) for row in rows], "seconds": limit - START_SECONDS / 2, "device": self.device}
        command = python(["-m", "benchmarks.gpu.worker", json.dumps(task)])
        output: IO[Any] = sys.stderr
        status = run_child(command, limit, self._add, output, _environment())
        if status == TIMED_OUT:
            self._add_missing(rows, {"failed": f"no answer within {limit:.0f} s"})
        self._add_missing(rows, {"failed": f"its process ended with status {status}"})

    def _add(self, line: Line) -> None:
        if "matmul" in line:
            self.name, self.matmul = line["device"], self.matmul or line["matmul"]
            return
        self.lines[line["row"]] = line
        print(f"{line['row']:32}{_outcome(line, self.matmul)}", file=sys.stderr, flush=True)

    def _add_missing(self, rows: list[Row], what: Line) -> None:
        for row in rows:
            if row.name not in self.lines:
                self._add({"row": row.name, **what})

    def figures(self) -> dict[str, float]:
        """Figures by their names, which the package documents."""
        found: dict[str, float] = {"matmul_tflops": _rounded(self.matmul / 1e12)}
        for name, line in self.lines.items():
            row = Row(*name.split("/"))
            for key, value in line.get("figures", {}).items():
                found[f"{row.side}_{key}_{row.length}" if row.is_attention else f"{row.figure}_{key}"] = _rounded(value)
            if line.get("out_of_memory"):
                found[f"{row.figure}_out_of_memory"] = 1
        return found | _ratios(found)

    def table(self, rows: list[Row]) -> str:
        """One line per row, in the order of `rows`."""
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
