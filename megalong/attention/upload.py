"""Copy small arrays to a device without making the host wait.

A copy from ordinary memory to a GPU blocks the host until all work queued before it is done; a copy from pinned memory
is queued. torch's pinned-memory allocator keeps a block until copies from it are complete, so callers need not hold it.
Uploads belong in a plan's cache (`AttentionPlan.cached`): once per micro-batch.
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
