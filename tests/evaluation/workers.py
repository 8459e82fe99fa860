"""What ranks of the pool run for the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megalong.runtime import distributed


def position_means(hf: Path, data: Path, seq_length: int, samples: int) -> list[float | None]:
    """Mean loss by position of a Hugging Face folder, the world split over the context."""
    device = torch.device("cpu")
    distributed.start(device)  # before anything imports megatron
    from megalong.evaluation.measure import measure_losses
    from megalong.evaluation.source import find_model, open_held_out

    source = find_model(hf=hf)
    packed = open_held_out(str(data), seq_length, samples, source)
    distributed.set_layout(distributed.Layout(context=dist.get_world_size()))
    try:
        return measure_losses(source, packed, samples, device).means()
    finally:
        distributed.clear_layout()
