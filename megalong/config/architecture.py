"""The shape of a model: everything needed to build it, nothing about how it is trained.

An `Architecture` comes from a Hugging Face `config.json`, from a checkpoint's `megalong.json`, or from the
`model.architecture` section for a random start. It is the same object in all three cases, so a random start, an import
and a resume build the same model.

The vocabulary is padded to the next multiple of 128 under every layout. 515 tokens become 640 rows at every
tensor-parallel size that divides 128, so checkpoints of different layouts have the same shapes. `vocab_size` stays the
true size, and export removes the padding.

A sliding window is part of the shape: a layer trained to see the last W tokens produces other logits if it sees all.
`window_size` and `window_attn_skip_freq` have the names and the meaning of Megatron-Core:

    window_size 4096                                  every layer sees 4096 tokens, its own included
    window_size 4096, window_attn_skip_freq 4         layers 4, 8, 12, ... see everything
    window_size 4096, window_attn_skip_freq [1, 0]    layer 1 has the window (1), layer 2 sees everything (0)
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megalong.config.rope import RopeSettings
from megalong.config.section import Section
from megalong.errors import UserError

VOCABULARY_MULTIPLE = 128
Positive = Annotated[int, Field(ge=1)]
LayerPattern = Annotated[tuple[Literal[0, 1], ...], Field(strict=False, min_length=1)]


class Architecture(Section):
    """Shape of a Llama. `kv_channels` (the head dimension) may be left out: hidden_size / num_attention_heads."""

    hidden_size: int = Field(ge=1)
    """Width of the model. Example: `4096`"""
    ffn_hidden_size: int = Field(ge=1)
    """Width of the MLP. Example: `14336`"""
    num_layers: int = Field(ge=1)
    """Transformer layers. Example: `32`"""
    num_attention_heads: int = Field(ge=1)
    """Query heads. Example: `32`"""
    num_query_groups: int = Field(ge=1)
    """Key/value heads. Example: `8`"""
    kv_channels: int = Field(ge=2)
    """Head dimension; default: hidden_size / num_attention_heads. Example: `128`"""
    vocab_size: int = Field(ge=1)
    """Vocabulary, before padding to a multiple of 128. Example: `128256`"""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    tie_word_embeddings: bool = False
    """Use the input embedding as the output layer."""
    max_position_embeddings: int = Field(ge=1)
    """Longest sequence the model was trained for. Example: `131072`"""
    rope: RopeSettings
    """RoPE scaling of the model; `rope_theta` is required. Example: `{rope_theta: 500000.0}`"""
    window_size: Positive | None = None
    """Sliding window in tokens. Example: `4096`"""
    window_attn_skip_freq: Positive | LayerPattern | None = None
    """Layers without a window, as in `attention`. Example: `4`"""
    bos_token_id: int | None = None
    """Token that begins a text. Example: `1`"""
    eos_token_id: int | list[int] | None = None
    """Token or tokens that end a text. Example: `2`"""
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights in a Hugging Face folder; a run is exported in `precision.params_dtype`."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def with_rope(self, override: RopeSettings | None) -> "Architecture":
        """The same model with another RoPE scaling (`model.rope` of a configuration); `None` changes nothing.

        The override replaces the whole scaling. Only two of its values default to the checkpoint's: the base
        (`rope_theta`) and the length before any scaling (`original_length`). `max_position_embeddings` of a scaled
        model is `factor * original`: transformers versions that derive the factor from the two lengths then get the
        same one. A model whose scaling is removed has its original length again. Applying the same override twice gives
        the same model, and an override equal to the model's own scaling changes nothing.
        """
        if override is None:
            return self
        original = override.original_max_position_embeddings or self.original_length
        scaled = override.type != "none"
        rope = override.model_copy(
            update={
                "rope_theta": override.rope_theta or self.rope.rope_theta,
                "original_max_position_embeddings": original if scaled else None,
            }
        )
        if rope == self.rope:
            return self
        longest = round(override.factor * original) if scaled else self.original_length
        return self.model_copy(update={"rope": rope, "max_position_embeddings": longest})

    @property
    def original_length(self) -> int:
        """Positions before any scaling: what the scaling states, else `max_position_embeddings / factor`.

        Only linear and ntk may leave it out; their factor is the ratio of the two lengths.
        """
        stated = self.rope.original_max_position_embeddings
        return stated or max(1, round(self.max_position_embeddings / self.rope.factor))

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """For each layer, how many tokens a token sees, itself included; None: all tokens before it."""
        pattern, layers = self.window_attn_skip_freq, range(self.num_layers)
        if isinstance(pattern, int):
            full = [(layer + 1) % pattern == 0 for layer in layers]
        else:
            full = [pattern is not None and pattern[layer] == 0 for layer in layers]
        return tuple(None if full[layer] else self.window_size for layer in layers)

    @property
    def widest_window(self) -> int | None:
        """The window that dominates the cost of attention; None if any layer sees everything."""
        return None if None in self.layer_windows else self.window_size

    def with_window(
        self, window_size: int | None, window_attn_skip_freq: int | tuple[Literal[0, 1], ...] | None = None
    ) -> "Architecture":
        """The same model with another window (`attention` of a configuration); without `window_size` it is unchanged.

        Window and pattern are replaced together, as `with_rope` replaces a scaling: a window alone applies to every
        layer, and `window_attn_skip_freq` 1 leaves every layer full.

        Raises:
            UserError: the pattern does not have one entry for each layer.
        """
        if window_size is None:
            return self
        wrong = _wrong_pattern(window_attn_skip_freq, self.num_layers)
        if wrong:
            raise UserError(f"attention.{wrong}")
        return self.model_copy(update={"window_size": window_size, "window_attn_skip_freq": window_attn_skip_freq})

    @model_validator(mode="before")
    @classmethod
    def _head_dimension(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("kv_channels") is not None:
            return values
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
            return {**values, "kv_channels": hidden // heads}
        return values

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}: every KV group serves the same number of heads"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels {self.kv_channels} must be even: RoPE rotates pairs of channels")
        if self.rope.rope_theta is None:
            raise ValueError("rope.rope_theta is required: it is the rotary base, such as Llama 3's 500000.0")
        if self.rope.type in ("yarn", "llama3") and self.rope.original_max_position_embeddings is None:
            raise ValueError(
                f"rope.original_max_position_embeddings is required with type {self.rope.type}: "
                "the longest sequence trained before scaling"
            )
        if self.window_attn_skip_freq is not None and self.window_size is None:
            raise ValueError(NO_WINDOW)
        wrong = _wrong_pattern(self.window_attn_skip_freq, self.num_layers)
        if wrong:
            raise ValueError(wrong)
        return self


NO_WINDOW = (
    "window_attn_skip_freq without window_size: it lists the layers without a window; write window_size, or leave both "
    "out"
)


def _wrong_pattern(pattern: int | tuple[int, ...] | None, layers: int) -> str | None:
    if not isinstance(pattern, tuple) or len(pattern) == layers:
        return None
    return (
        f"window_attn_skip_freq {list(pattern)} has {len(pattern)} entries and the model {layers} layers; write one "
        "for each layer, 1 (window) or 0 (full), or a number N that leaves every N-th layer full"
    )
