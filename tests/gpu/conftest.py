"""Parity on one GPU: `bash tests/gpu/run.sh`, on a machine with torch and a GPU; it needs no network.

Every test here is marked `gpu` and skipped by name where torch sees no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"{item.name} needs an NVIDIA GPU"))


@pytest.fixture
def gpu_world() -> Iterator[torch.device]:
    """A world of one on the GPU, in this process."""
    from megalong.runtime import distributed

    device = distributed.choose_device("cuda")
    distributed.start(device)
    yield device
    distributed.stop()
