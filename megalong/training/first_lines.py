"""The line that says which model a run trains and under which positions, before its first step.

model: 134,515,008 parameters; rope yarn, factor 4 × 8192 = 32768 positions, base 100000, attention temperature
1.1386; samples use 32768 positions
"""

from __future__ import annotations

from megalong.config.architecture import Architecture
from megalong.config.positions import covered_positions, trained_positions
from megalong.config.schema import Config
from megalong.costs.flops import matrix_entries
from megalong.rope.scaling import ntk_theta, temperature, theta_of


def model_line(config: Config, architecture: Architecture) -> str:
    """Parameters, rope, its temperature and length, and the positions that the run's samples use."""
    positions, key = trained_positions(config)
    line = f"model: {parameter_count(architecture):,} parameters; {rope_words(architecture)}; samples use {positions}"
    beyond = positions > covered_positions(architecture)
    return f"{line} ({key}), more than that by model.allow_extrapolation" if beyond else f"{line} ({key})"


def rope_words(architecture: Architecture) -> str:
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
    """Weights of the whole model, a tied output head counted once; the vocabulary's padding is none."""
    embedding = 0 if architecture.tie_word_embeddings else architecture.hidden_size * architecture.vocab_size
    norms = (2 * architecture.num_layers + 1) * architecture.hidden_size
    return matrix_entries(architecture) + embedding + norms
