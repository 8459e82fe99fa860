"""Llama on Megatron-Core: `GPTModel` builds the modules, the forward pass is our own.

    tokens ── embedding ──▶ layers (positions and document boundaries in `attention_inputs`) ──▶ head ──▶ losses

RoPE is applied in `core_attention.py` (`position_embedding_type="none"`), the loss is computed in `head.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megalong.config.architecture import Architecture
from megalong.model.attention_inputs import AttentionInputs
from megalong.model.backend import backend_of
from megalong.model.config import LlamaConfig
from megalong.model.head import Head
from megalong.model.kv_cache import KVCache
from megalong.model.spec import llama_block


class LlamaModel(GPTModel):
    """One pipeline stage of a Llama.

    Args:
        config: from `model.config.transformer_config`.
        architecture: the model's true sizes.
        virtual_stage: index of this model chunk on its rank; None without interleaving.

    Attributes:
        first_layer: index, in the whole model, of this stage's first layer.
    """

    output_layer: Any

    def __init__(self, config: LlamaConfig, architecture: Architecture, virtual_stage: int | None = None) -> None:
        self._backend = backend_of(config)
        parts = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        where = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
        super().__init__(
            config=config,
            transformer_layer_spec=llama_block(config.num_layers // parts, config, self._backend),
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
        self._head = Head(self.output_layer, architecture.vocab_size) if self.post_process else None

    def setup_embeddings_and_output_layer(self) -> None:
        """Megatron-Core calls this after it has built all modules; its `output_layer` is always of its own class."""
        if self.post_process and type(self.output_layer) is not self._backend.output:
            self.output_layer = self._backend.output(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            )
        super().setup_embeddings_and_output_layer()

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor | None, attention_inputs: AttentionInputs
    ) -> torch.Tensor:
        """Losses float32 [b, s] of tokens and labels int64 [b, s]; without labels the logits [b, s, V/TP].

        This is the last stage's result. An earlier stage returns hidden states [s, b, h]. A stage after the first reads
        its input from `set_input_tensor`.
        """
        hidden = self._hidden(tokens, attention_inputs)
        if self._head is None:
            return hidden
        weight = self._tied_weight()
        return self._head.logits(hidden, weight) if labels is None else self._head.losses(hidden, labels, weight)

    @torch.no_grad()
    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read `tokens` int64 [b, s], which follow those in `cache`, and predict the token after them.

        Returns:
            float32 [b, V] without vocabulary padding. This rank must hold the whole model.
        """
        length = tokens.shape[1]
        positions = torch.arange(cache.length, cache.length + length, device=tokens.device)[None]
        hidden = self._hidden(tokens, AttentionInputs(positions=positions, cache=cache))
        cache.advance(length)
        assert self._head is not None
        return self._head.last_logits(hidden, self._tied_weight())

    def _hidden(self, tokens: torch.Tensor, attention_inputs: AttentionInputs) -> torch.Tensor:
        embedded = self.embedding(tokens, None) if self.pre_process else None
        hidden: torch.Tensor = self.decoder(embedded, attention_mask=None, packed_seq_params=attention_inputs)
        return hidden

    def _tied_weight(self) -> torch.Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
