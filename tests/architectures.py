"""Models that tests count with, without weights."""

from megalong.config.architecture import Architecture
from megalong.config.rope import RopeSettings

TINY = Architecture(
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=300,
    max_position_embeddings=128,
    rope=RopeSettings(rope_theta=10000.0),
)
LLAMA_8B = Architecture(
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope=RopeSettings(rope_theta=500000.0),
)
