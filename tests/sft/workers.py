"""What a rank runs in the tests of fine-tuning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tests.training.workers import _session


def sft_steps(settings: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Loss and gradient norm of the first steps, and their tokens: learnt, and all that are no padding."""
    with _session(settings) as session:
        import torch.distributed as dist

        from megalong.batches.loader import Batches
        from megalong.batches.open_samples import open_samples
        from megalong.training.step import TrainStep

        config = session.config
        folder = Path(config.run.dir) / "index"
        if dist.get_rank() == 0:
            open_samples(config, "train", session.assets, folder)
        dist.barrier()
        opened = partial(open_samples, config, "train", session.assets, folder)
        batches = Batches(config, opened, session.device)
        step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        size = config.training.global_batch_size
        results = [step.run(batches, index * size) for index in range(steps)]
        return {
            "loss": [r.loss for r in results],
            "norm": [r.gradient_norm for r in results],
            "learnt": [r.tokens for r in results],
            "filled": [r.filled for r in results],
        }
