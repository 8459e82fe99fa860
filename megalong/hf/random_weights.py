"""Random initial weights, the same under every layout.

Each tensor has its own generator, seeded by the run's seed and the tensor's Hugging Face name. A rank draws whole
tensors and keeps its slice, so TP 8 × PP 4 starts from the same numbers as one process.
"""

from __future__ import annotations

import hashlib
import math

import torch

from megalong.config.architecture import Architecture
from megalong.hf.weight_map import hf_shapes

STANDARD_DEVIATION = 0.02


class RandomWeights:
    """Random weights with the interface of `HFReader`.

    Norms are one. Everything else is normal with σ = 0.02; the two projections that write into the residual stream have
    σ = 0.02 / √(2 · layers) (the rule of Megatron and GPT-2).
    """

    folder = "random weights"

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self._shapes = hf_shapes(architecture)
        self._seed = seed
        self._residual = STANDARD_DEVIATION / math.sqrt(2 * architecture.num_layers)

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> torch.Tensor:
        """A slice of a tensor, float32."""
        shape = self._shapes[name]
        if len(shape) == 1:
            whole = torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            deviation = self._residual if name.endswith(("o_proj.weight", "down_proj.weight")) else STANDARD_DEVIATION
            whole = torch.randn(shape, generator=generator) * deviation
        return whole.narrow(dim, start, whole.shape[dim] - start if length is None else length)
