"""RMSNorm that works under sequence parallelism without Transformer Engine or apex.

Megatron-Core's own torch norm refuses sequence parallelism, although marking the weight is enough. Each tensor-parallel
rank normalizes its own tokens, so the weight's gradient must be summed over the tensor-parallel group, and
Megatron-Core does this for parameters with `sequence_parallel = True`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Shapes: input and output [sequence, batch, hidden]. Extra keyword arguments from Megatron-Core are ignored.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if not config.use_cpu_initialization:
            self.weight.data = self.weight.data.to(torch.cuda.current_device())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize `hidden`, computing in float32."""
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
