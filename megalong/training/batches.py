"""From packed samples to this rank's micro-batches.

Global batch t is samples t·B … t·B + B - 1. Data-parallel rank r of D takes the micro-batches r, r + D, r + 2D, … of
that batch, so the same global batch is trained on whatever D is, and the position in the data is the one number
`consumed_samples`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core import parallel_state

from megalong.attention.layout import TokenLayout
from megalong.config.attention_checks import FP8_TOKENS
from megalong.config.schema import Config
from megalong.data.sampler import PackedSamples
from megalong.model.batch import MicroBatch, shard_samples


class Batches:
    """This rank's share of every global batch."""

    def __init__(self, config: Config, samples: PackedSamples, device: torch.device, window: int | None = None) -> None:
        """`window` is the model's widest: balanced layouts count attended pairs with it."""
        self.samples = samples
        self.global_batch_size = config.training.global_batch_size
        self.micro_batch_size = config.training.micro_batch_size
        self.device = device
        self._layout = TokenLayout(config.parallel.context_parallel_size, config.token_layout, window)
        self._masked = config.data.masked
        # Sequence parallelism cuts a context-parallel shard over the tensor-parallel ranks, and FP8 matrices on a GPU
        # want a rank's tokens to be a multiple of 8.
        parallel = config.parallel
        fp8 = FP8_TOKENS if config.precision.fp8 is not None else 1
        self._multiple = fp8 * parallel.context_parallel_size
        if parallel.sequence_parallel:
            self._multiple *= parallel.tensor_model_parallel_size
        self._context_rank = parallel_state.get_context_parallel_rank()
        self._replica = parallel_state.get_data_parallel_rank()
        self._replicas = parallel_state.get_data_parallel_world_size()

    @property
    def count(self) -> int:
        """Micro-batches this rank runs for one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self._replicas)

    def at(self, consumed_samples: int) -> Iterator[MicroBatch]:
        """The micro-batches of the global batch that starts at sample `consumed_samples`."""
        for index in range(self.count):
            first = consumed_samples + (index * self._replicas + self._replica) * self.micro_batch_size
            numbers = range(first, first + self.micro_batch_size)
            whole = torch.from_numpy(np.stack([self.samples.sample(k) for k in numbers]))
            documents = [self.samples.documents(k) for k in numbers] if self._masked else None
            filled = [self.samples.filled(k) for k in numbers]
            yield shard_samples(whole, self._layout, self._context_rank, self.device, documents, self._multiple, filled)
