"""Small arrays on their way to a device, without the host waiting for it.

A copy from ordinary memory to a GPU makes the host wait until all that is queued before it is done. From pinned memory
it is queued itself. torch's allocator of pinned memory keeps a block until copies from it are through, so nobody here
need hold on to it. What is uploaded belongs into a plan's cache (`AttentionPlan.kept`): once per micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`, in its own type; on the CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
