#!/usr/bin/env python3
"""The first run on a GPU: everything that only one can tell, in ten minutes, in the order of what it settles.

    python3 tests/gpu/first_run.py [--only NAME…] [--seconds N] [--list] [--rehearse]

Lines of JSON while it runs, a table at the end (tests/gpu/harness.py). Exit status 0: no step failed; 1: one did, or
ran out of time; 2: wrong arguments, or no GPU. `first_run.sh` brings packages that are missing. `--rehearse` runs the
same code on the CPU at tiny sizes: it finds wrong arguments, and tells nothing of a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from itertools import accumulate
from pathlib import Path

sys.path.pop(0)  # this folder
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.gpu.harness import Harness, run_step, table
from tests.gpu.steps import STEPS

NAMES = [step.name for step in STEPS]
FIRST_PASS = 480.0  # seconds


def main() -> int:
    """Run the steps that are asked for."""
    parser = argparse.ArgumentParser(description="The first run on a GPU.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"steps that no longer fit are skipped by name ({FIRST_PASS:g}; no limit with --only)",
    )
    parser.add_argument("--list", action="store_true", help="the steps and their estimates")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--step", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--report-to", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = [step for step in STEPS if options.only is None or step.name in options.only]
    if options.list:
        print("\n".join(f"{step.seconds:5.0f} s  {step.name:14}{step.about}" for step in steps))
        sums = [seconds for seconds in accumulate(step.seconds for step in steps) if seconds <= FIRST_PASS]
        print(f"{sums[-1]:5.0f} s  for the first {len(sums)}; the others run where these leave time")
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --rehearse runs the same code on the CPU")
    if options.step:
        return run_step(STEPS[NAMES.index(options.step)], options.rehearse, options.report_to)
    seconds = options.seconds or (math.inf if options.only else FIRST_PASS)
    harness = Harness([os.path.abspath(__file__)], seconds, options.rehearse)
    outcomes = harness.run(steps)
    print(f"\n{table(outcomes)}\nlines and log: {harness.folder}", flush=True)
    return int(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
