"""NCCL's flight recorder: which collective each rank was in when one timed out.

torch keeps the last events of every NCCL group in a ring buffer. When a collective times out, each rank dumps its own
to `RUN/nccl/rank_N`; `torchfrtrace` (part of torch) compares the dumps and names the rank that did not take part. It
costs only memory, so it is on by default. torch reads these variables when the first group is made; a variable that is
already set is left alone.
"""

from __future__ import annotations

import os
from pathlib import Path


def record_collectives(run_dir: Path, events: int) -> None:
    """Make torch keep `events` per group and dump them into `run_dir/nccl` on a timeout; 0 changes nothing."""
    if not events:
        return
    folder = run_dir / "nccl"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = str(folder.resolve() / "rank_")
    settings = {
        # torch renamed two of these: the second and the fourth are the names in older versions.
        "TORCH_FR_BUFFER_SIZE": str(events),
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(events),
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
