"""The same training steps in `transformers`, like its Trainer with `bf16=True, gradient_checkpointing=True`.

Weights and AdamW (torch's fused one) are float32, matrix products are bf16 by autocast, attention is torch's cuDNN or
flash kernel, without a mask because every sample is one whole sequence. Weights, gradients and moments take 16 bytes
per parameter; ours take 18.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalong.config.architecture import Architecture


class TheirTraining:
    """Training steps of one model in this process."""

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        from transformers import LlamaForCausalLM

        self.device, self.vocabulary = device, architecture.vocab_size
        with device:
            self.model = LlamaForCausalLM._from_config(_llama(architecture), attn_implementation="sdpa")
        self.model.float().train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step(self, length: int, sequences: int = 1) -> float:
        """Train on `sequences` sequences of `length` tokens, one per micro-batch; returns their loss."""
        losses = [self._gradients(length) / sequences for _ in range(sequences)]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())

    def _gradients(self, length: int) -> torch.Tensor:
        tokens = torch.randint(0, self.vocabulary, (1, length), device=self.device)
        fast: Any = nullcontext()
        if self.device.type == "cuda":
            fast = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)
        with torch.autocast(self.device.type, torch.bfloat16), fast:
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        return loss.detach()

    def close(self) -> None:
        """Nothing to close: there is no prefetching."""


def _llama(architecture: Architecture) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_query_groups,
        head_dim=architecture.kv_channels,
        max_position_embeddings=architecture.max_position_embeddings,
        tie_word_embeddings=architecture.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope.rope_theta or 1e4},
    )
