"""The log line before the first step: the model's size, its RoPE, and the positions that samples use.

model: 134,515,008 parameters; rope yarn, factor 4 × 8192 = 32768 positions, base 100000, attention temperature
1.1386; samples use 32768 (data.seq_length)
"""

from __future__ import annotations

from megalong.config.architecture import Architecture
from megalong.config.positions import covered_positions, trained_positions
from megalong.config.schema import Config
from megalong.costs.flops import matrix_entries
from megalong.rope.scaling import ntk_theta, temperature, theta_of


def model_line(config: Config, architecture: Architecture) -> str:
    """The line above for one run."""
    positions, key = trained_positions(config)
    model = f"model: {parameter_count(architecture):,} parameters; {describe_rope(architecture)}"
    line = f"{model}; samples use {positions} ({key})"
    beyond = positions > covered_positions(architecture)
    return f"{line}, beyond the model's length (model.allow_extrapolation)" if beyond else line


def describe_rope(architecture: Architecture) -> str:
    """`rope yarn, factor 4 × 8192 = 32768 positions, base 100000, attention temperature 1.1386`."""
    rope, covered = architecture.rope, covered_positions(architecture)
    base = f"base {theta_of(rope):,.0f}".replace(",", "")
    if rope.type == "none":
        return f"rope unscaled, {covered} positions, {base}, attention temperature 1"
    if rope.type == "ntk":
        base = f"{base} changed to {ntk_theta(rope, architecture.kv_channels):.0f}"
    reach = round(rope.factor * architecture.original_length)
    length = f"{covered} positions" if reach == covered else f"the model's own {covered} positions"
    equals = "=" if reach == covered else "of"
    return (
        f"rope {rope.type}, factor {rope.factor:g} × {architecture.original_length} {equals} {length}, {base}, "
        f"attention temperature {temperature(rope):.5g}"
    )


def parameter_count(architecture: Architecture) -> int:
    """Weights of the whole model. A tied output head counts once, vocabulary padding not at all."""
    embedding = 0 if architecture.tie_word_embeddings else architecture.hidden_size * architecture.vocab_size
    norms = (2 * architecture.num_layers + 1) * architecture.hidden_size
    return matrix_entries(architecture) + embedding + norms
