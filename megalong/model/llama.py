"""Llama as a Megatron-Core `GPTModel`.

Two things differ from its parent. Positions are ours (`position_embedding_type="none"`; see `core_attention`). And the
vocabulary is padded to a multiple of 128 so that any tensor-parallel size divides it: the padding's logits are taken
out of the softmax, so that neither the loss nor its gradient depends on how much padding there is.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megalong.config.architecture import Architecture
from megalong.model.batch import AttentionInputs
from megalong.model.config import LlamaConfig
from megalong.model.kv_cache import KVCache
from megalong.model.spec import llama_block


class LlamaModel(GPTModel):
    """One pipeline stage of a Llama.

    Args:
        config: from `model.config.transformer_config`.
        architecture: the model's true sizes.
        virtual_stage: which of this rank's parts it is, None where each rank holds one.

    Attributes:
        first_layer: the model's number of this stage's first layer.
    """

    def __init__(self, config: LlamaConfig, architecture: Architecture, virtual_stage: int | None = None) -> None:
        parts = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        where = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
        super().__init__(
            config=config,
            transformer_layer_spec=llama_block(config.num_layers // parts, config),
            vocab_size=architecture.padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="none",
            vp_stage=virtual_stage,
        )
        self.first_layer: int = get_transformer_layer_offset(config, virtual_stage)
        self.architecture = architecture

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each token, [b, s] float32, from vocabulary-parallel logits [s, b, V/TP]."""
        return super().compute_language_model_loss(labels, self._without_padding(logits))

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        width = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * width
        valid = self.architecture.vocab_size - first
        if valid >= width:
            return logits
        padding = torch.arange(width, device=logits.device) >= valid
        # A finite floor: a rank that holds nothing but padding must not turn its maximum into -inf - -inf.
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Losses [b, s] when `labels` are given, else logits [b, s, V/TP]; hidden states before the last stage."""
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read `tokens` int64 [b, s], which follow what `cache` holds, and predict the one after them.

        Only the last token's logits are computed: those of a whole prompt would outweigh the model.

        Returns:
            float32 [b, V] without the vocabulary's padding; the model must lie whole on this rank.
        """
        length = tokens.shape[1]
        positions = torch.arange(cache.length, cache.length + length, device=tokens.device)[None]
        inputs = AttentionInputs(positions=positions, cache=cache)
        hidden = self.decoder(self.embedding(tokens, None), attention_mask=None, packed_seq_params=inputs)
        cache.advance(length)
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden[-1:], weight=shared)
        return logits[0, :, : self.architecture.vocab_size].float()
