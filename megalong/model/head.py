"""The loss head: from hidden states of the last layer to losses, or to the logits of the next token.

The vocabulary is padded to a multiple of 128, so that every tensor-parallel size divides it. Neither the loss nor its
gradient may depend on the amount of padding. Its columns are overwritten in place, without a copy of the logits, which
are the largest tensor of a step: 4 bytes × tokens × vocabulary / TP.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear


class Head:
    """A model's output layer, and the losses or logits computed with it.

    Args:
        output_layer: hidden → this rank's shard of the padded vocabulary.
        vocab_size: the vocabulary without padding.

    `weight` below is the shared embedding of a tied model [V/TP, h]; None if `output_layer` has a weight of its own.
    """

    def __init__(self, output_layer: ColumnParallelLinear, vocab_size: int) -> None:
        self._output_layer, self._vocab_size = output_layer, vocab_size

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Cross-entropy per token in nats, float32 [b, s].

        Hidden states are [s, b, h] ([s/TP, b, h] with sequence parallelism), labels int64 [b, s].
        """
        logits, _ = self._output_layer(hidden, weight=weight)
        logits = self._without_padding(logits)
        losses: torch.Tensor = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
        return losses.transpose(0, 1).contiguous()

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Logits [b, s, V/TP] of hidden [s, b, h], in the weights' type; padding is the lowest finite number."""
        logits, _ = self._output_layer(hidden, weight=weight)
        return self._without_padding(logits).transpose(0, 1).contiguous()

    def last_logits(self, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Logits after the last token, float32 [b, V] without padding, of hidden [s, b, h].

        This rank must hold the whole vocabulary. Logits of a whole prompt would take more memory than the model.
        """
        logits, _ = self._output_layer(hidden[-1:], weight=weight)
        return logits[0, :, : self._vocab_size].float()

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        width = logits.shape[-1]
        valid = self._vocab_size - parallel_state.get_tensor_model_parallel_rank() * width
        return logits if valid >= width else _MaskPadding.apply(logits, max(valid, 0))


class _MaskPadding(torch.autograd.Function):
    """Sets columns from `valid` on to the lowest finite number, so that their softmax and gradient are exactly 0.

    Finite, because on a rank with nothing but padding -inf would make the softmax compute -inf - -inf.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, valid: int) -> torch.Tensor:
        logits[..., valid:] = torch.finfo(logits.dtype).min
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
