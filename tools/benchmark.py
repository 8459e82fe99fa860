#!/usr/bin/env python3
"""Measure megalong against an alternative that a user could choose: `python tools/benchmark.py NAME [--json]`.

Every figure is a ratio or comes with one: both sides run in turn, in one call, on the same machine. Absolute times of
one machine say little about another, and the speed of shared machines drifts. With `--json`, stdout gets only one
object: {"benchmark": NAME, "figures": {...}}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

BENCHMARKS = {
    "attention": "context-parallel attention against one process with as many threads; document masks; rotary",
    "checkpoint": "saving and loading against plain files on the same disk; pause and memory of a background save",
    "fp8": "200 steps of a small Llama in bf16 and in emulated FP8: loss ratios, curves in fp8-loss.png",
    "gpu": "training steps of Llamas at 8K to 256K tokens against transformers on one GPU, and attention by backend",
    "index": "building and opening the sample index of ten million documents, against Megatron-Core's steps",
    "loader": "reading samples of a million tokens against memcpy; how long training waits for its batches",
    "preprocess": "tokenizing 125 MB and 2 GB of JSON lines against one `tokenizers` process per worker",
    "step": "one training step against transformers (SDPA) on the same small Llama, one CPU process each",
}


def main() -> int:
    """Run one benchmark; print a table or one JSON object."""
    epilog = "benchmarks: " + "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(description="Measure megalong.", epilog=epilog)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    gpu = parser.add_argument_group("only for gpu")
    gpu_options = [
        gpu.add_argument("--quick", action="store_true", help="without the longest rows, eight minutes at most"),
        gpu.add_argument("--rows", nargs="+", metavar="PATTERN", help="measure these rows: '1b/*', '*/256k/*'"),
        gpu.add_argument("--skip", nargs="+", metavar="PATTERN", help="skip these rows"),
        gpu.add_argument("--seconds", type=float, metavar="N", help="time budget; rows that do not fit are skipped"),
        gpu.add_argument("--list", action="store_true", help="list the rows and their estimates without measuring"),
        gpu.add_argument("--tiny", action="store_true", help="try the code on a CPU"),
    ]
    options = parser.parse_args()
    given = [action.option_strings[0] for action in gpu_options if getattr(options, action.dest)]
    if given and options.name != "gpu":
        parser.error(f"{given[0]} is for gpu, not for {options.name}")
    module = importlib.import_module(f"benchmarks.{options.name}")
    report = module.run(options) if options.name == "gpu" else module.run()
    if options.json:
        print(json.dumps({"benchmark": options.name, "figures": report.figures}))
    else:
        print(report.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
