#!/usr/bin/env python3
"""Measure megalong against something a user would use instead: `python tools/benchmark.py NAME [--json]`.

Every figure is a ratio, or stands beside one: both sides run in turn, in one call, on the same machine. Absolute
times of one machine say little about another, and shared machines drift. With `--json` one object goes to stdout,
{"benchmark": NAME, "figures": {...}}, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

BENCHMARKS = {
    "attention": "context-parallel attention against one process with as many threads; document masks; rotary",
    "checkpoint": "saving and loading beside plain files on the same disk; the pause of a save in the background",
    "fp8": "200 steps of a small Llama in bf16 and in emulated FP8: loss ratios, curves in fp8-loss.png",
    "gpu": "attention on one GPU by backend: TFLOP/s beside torch's SDPA and the chip's matmul rate",
    "index": "the sample index of ten million documents, built and opened, beside Megatron-Core's steps",
    "loader": "samples of a million tokens against memcpy; how long training waits for its batches",
    "preprocess": "tokenizing 125 MB and 2 GB of JSON lines against one `tokenizers` process a worker",
    "step": "one training step against transformers (SDPA) on the same small Llama, one CPU process each",
}


def main() -> int:
    """Run one benchmark; print a table for people, or one JSON object."""
    epilog = "benchmarks: " + "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(description="Measure megalong.", epilog=epilog)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args()
    report = importlib.import_module(f"benchmarks.{options.name}").run()
    if options.json:
        print(json.dumps({"benchmark": options.name, "figures": report.figures}))
    else:
        print(report.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
