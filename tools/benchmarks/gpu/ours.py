"""Our whole training steps on random weights and random tokens: all that a run does between two log lines.

    prefetched batches → Megatron-Core's schedule and layers → gradients in float32 → norm, guard, clip → AdamW

Built from the same parts as a run, in the same order; weights are initialized on the device instead of loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megalong.config.architecture import Architecture
from megalong.config.schema import Config
from megalong.runtime import distributed

Documents = Callable[[int], np.ndarray]


class OurTraining:
    """Training steps of one model in this process, which is the only rank or a rank of a world joined before.

    Args:
        documents: gives the first tokens of the documents of sample k, which are masked from each other; None: one
            document per sample.
        sections: of the configuration; they override `precision.params_dtype: bf16` and `memory.recompute: full`.
    """

    def __init__(
        self, architecture: Architecture, device: torch.device, documents: Documents | None = None, **sections: Any
    ) -> None:
        self.architecture, self.device, self._documents = architecture, device, documents
        self._sections = sections
        self._batches: dict[tuple[int, int], Any] = {}
        self._consumed: dict[tuple[int, int], int] = {}
        distributed.start(device)  # before anything imports Megatron-Core
        self.train, self.optimizer = self._built()

    def step(self, length: int, sequences: int = 1) -> float:
        """Train on `sequences` sequences of `length` tokens, one per micro-batch; returns their loss."""
        key = length, sequences
        if key not in self._batches:
            self.close()
            self._batches[key], self._consumed[key] = self._open(length, sequences), 0
        result = self.train.run(self._batches[key], self._consumed[key])
        self._consumed[key] += sequences
        return float(result.loss)

    def close(self) -> None:
        """Stop prefetching."""
        for batches in self._batches.values():
            batches.close()
        self._batches.clear()

    def _built(self) -> tuple[Any, Any]:
        from megalong.attention.transformer_engine import machine_of
        from megalong.config.attention_checks import check_fp8_model, check_machine
        from megalong.config.resolved import resolve
        from megalong.model.build import build_model, wrap_for_training
        from megalong.training.optimizer import build_optimizer, build_scheduler
        from megalong.training.setup import model_settings
        from megalong.training.step import TrainStep

        config, machine = self._config(1024, 1), machine_of(self.device)
        check_machine(config, machine)
        check_fp8_model(config, machine, self.architecture)
        resolved = resolve(config, self.architecture, machine, torch.distributed.get_world_size())
        distributed.set_grid(resolved.grid, config.run.seed)
        bare = build_model(self.architecture, model_settings(config, resolved))
        for parameter in (parameter for chunk in bare for parameter in chunk.parameters()):
            torch.nn.init.normal_(parameter, 0, 0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
        chunks = wrap_for_training(bare, config.parallel)
        optimizer = build_optimizer(config, chunks)
        return TrainStep(chunks, optimizer, build_scheduler(config, optimizer)), optimizer

    def _open(self, length: int, sequences: int) -> Any:
        from megalong.batches.loader import Batches

        vocabulary, documents = self.architecture.vocab_size, self._documents
        return Batches(
            self._config(length, sequences), lambda: RandomSamples(length, vocabulary, documents), self.device
        )

    def _config(self, length: int, sequences: int) -> Config:
        sections: dict[str, Any] = {
            "run": {"name": "benchmark", "dir": "none"},
            "model": {"architecture": self.architecture.model_dump()},
            "data": {
                "seq_length": length,
                "mixture": [{"name": "none", "path": "none", "weight": 1.0}],
                "packing": "naive" if self._documents is None else "masked",
            },
            "precision": {"params_dtype": "bf16"},
            "memory": {"recompute": "full"},
            "optimizer": {"lr": 1e-5, "lr_schedule": "constant"},
            "training": {"train_iters": 10**6, "micro_batch_size": 1, "global_batch_size": sequences},
        }
        for name, values in self._sections.items():
            sections.setdefault(name, {}).update(values)
        return Config.model_validate(sections)


class RandomSamples:
    """A few samples in memory, repeated, so that reading them costs nothing."""

    def __init__(self, length: int, vocabulary: int, documents: Documents | None, kept: int = 4) -> None:
        self.seq_length = length
        self._documents = documents
        self._rows = np.random.default_rng(0).integers(0, vocabulary, (kept, length + 1))

    def read(self, k: int) -> Any:
        """Sample k."""
        from megalong.data.samples.sample import Sample

        starts = np.zeros(1, np.int64) if self._documents is None else self._documents(k)
        return Sample(self._rows[k % len(self._rows)], starts, self.seq_length + 1)

    def describe(self, samples: int) -> list[object]:
        """Nothing to describe."""
        return []

    def prepare(self, first: int, last: int) -> None:
        """Nothing to prepare."""
