"""What a rank of the worker pool runs in the tests of tools/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megalong.runtime import distributed

sys.path.append(str(Path(__file__).parents[2] / "tools"))


def first_losses(size: str, length: int, steps: int, **sections: Any) -> list[float]:
    """Of the benchmark's training steps of ours, two sequences a step."""
    from benchmarks.gpu.ours import OurTraining
    from benchmarks.gpu.rows import architecture

    training = OurTraining(architecture(size), torch.device("cpu"), **sections)
    try:
        return [training.step(length, 2) for _ in range(steps)]
    finally:
        training.close()
        distributed.clear_grid()
