"""NCCL's flight recorder: which collective each rank was in when one of them timed out.

torch keeps the last events of every NCCL group in a ring buffer and, when a collective times out, each rank dumps its
own to `RUN/nccl/rank_N`; `torchfrtrace` (part of torch) compares the dumps and names the rank that did not come. It
costs nothing but memory, so it is on by default. torch reads these variables when the first group is made; a variable
that is set already is left alone.
"""

from __future__ import annotations

import os
from pathlib import Path


def record_collectives(run_dir: Path, events: int) -> None:
    """Ask torch to keep `events` per group and to dump them into `run_dir/nccl` on a time-out; 0 asks for nothing."""
    if not events:
        return
    folder = run_dir / "nccl"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = str(folder.resolve() / "rank_")
    settings = {
        # torch renamed the first and the third; older versions know only the second and the fourth.
        "TORCH_FR_BUFFER_SIZE": str(events),
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(events),
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
