"""How a step is computed: `parallel`, `attention`, `precision` and `memory`."""

from typing import Literal, Self

from pydantic import model_validator

from megalong.config.architecture import NO_WINDOW, LayerPattern, Positive
from megalong.config.section import Section

FP8_TOKENS = 8  # Transformer Engine needs a rank's number of tokens to be a multiple of this


class Parallel(Section):
    """How the model and the sequence are split; the rest of the world size is data parallel.

    `virtual_pipeline_model_parallel_size` V above 1 interleaves: each pipeline rank holds V parts of the model, layers
    r, r + P, r + 2P, ... in units of layers / (P * V), which shortens the pipeline bubble V times. The defaults of the
    two p2p switches depend on this: an interleaved pipeline overlaps its sends with compute, a plain one sends in
    batches.
    """

    tensor_model_parallel_size: Positive = 1
    """TP: ranks that share every layer's weights."""
    context_parallel_size: Positive = 1
    """CP: ranks that share every sequence."""
    pipeline_model_parallel_size: Positive = 1
    """PP: ranks that share the layers."""
    virtual_pipeline_model_parallel_size: Positive = 1
    """Parts of the model per pipeline rank; above 1 the schedule is interleaved."""
    sequence_parallel: bool = False
    """Also split activations outside attention and MLP over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = True
    """Split optimizer state and fp32 master weights over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with backward."""
    overlap_param_gather: bool = False
    """Overlap the gathering of updated parameters with the next forward."""
    overlap_p2p_comm: bool | None = None
    """Overlap pipeline sends with compute; default: only if interleaved. Example: `true`"""
    batch_p2p_comm: bool | None = None
    """Send and receive between pipeline stages in one batch; default: only if not interleaved. Example: `false`"""


class Attention(Section):
    """Kernel, context-parallel exchange, token layout and sliding windows."""

    backend: Literal["auto", "torch", "transformer_engine"] = "auto"
    """`auto`: Transformer Engine for FP8 attention on a GPU, else the device's fastest torch kernel."""
    exchange: Literal["auto", "ring", "all_gather", "ulysses", "ring_ulysses"] = "auto"
    """How context-parallel ranks share attention: `ring` sends K/V blocks, `all_gather` gathers all K/V, `ulysses`
    swaps tokens for heads, `ring_ulysses` does this within groups of `ulysses_size` ranks and a ring between them.
    `auto` decides by heads and lengths and logs the reason.
    """
    ulysses_size: Positive | None = None
    """Ranks of a `ring_ulysses` group. Example: `8`"""
    layout: Literal["auto", "zigzag", "per_document_zigzag", "balanced"] = "auto"
    """Which tokens each context-parallel rank has; `auto` is `zigzag` for naive packing, `balanced` otherwise."""
    window_size: Positive | None = None
    """Sliding window in tokens, the token itself included; becomes part of the model. Default: the model's own.
    Example: `4096`
    """
    window_attn_skip_freq: Positive | LayerPattern | None = None
    """N keeps every N-th layer full; a list has 1 (window) or 0 (full) for each layer. Example: `4`"""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.window_attn_skip_freq is not None and self.window_size is None:
            raise ValueError(NO_WINDOW)
        if self.ulysses_size is not None and self.exchange != "ring_ulysses":
            raise ValueError(
                f"ulysses_size {self.ulysses_size} with exchange {self.exchange}: only ring_ulysses has groups of that "
                "size; write exchange: ring_ulysses, or leave ulysses_size out"
            )
        return self


class Precision(Section):
    """Data type of weights and activations, and FP8. Gradients and optimizer state are fp32."""

    params_dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Round the operands of linear layers to 8 bits: `hybrid` is e4m3 forward and e5m2 for gradients. Emulated without
    a GPU. Example: `hybrid`
    """
    fp8_recipe: Literal["delayed", "tensorwise"] = "delayed"
    """Scales from the step before (`delayed`) or from the tensor itself (`tensorwise`)."""
    fp8_dot_product_attention: bool = False
    """Round attention's operands too."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.fp8_dot_product_attention and self.fp8 is None:
            raise ValueError(
                "fp8_dot_product_attention true without fp8, which names the 8-bit types: write fp8: hybrid, or "
                "fp8_dot_product_attention: false"
            )
        if self.fp8 is not None and self.params_dtype != "bf16":
            raise ValueError(
                f"fp8 {self.fp8} with params_dtype {self.params_dtype}: the results of FP8 products are bf16; write "
                "params_dtype: bf16, or fp8: null"
            )
        return self


class Memory(Section):
    """What backward recomputes instead of storing."""

    recompute: Literal["none", "selective", "full"] = "none"
    """`selective` recomputes attention, `full` recomputes whole layers."""
