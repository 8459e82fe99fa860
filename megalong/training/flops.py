"""Floating-point operations a token needs, counted from the model's shape alone.

A weight matrix of n entries costs 2n operations a token forward (multiply, add) and twice that backward: 6n.
Attention costs, per layer and token at position p, 2 products (scores, values) x 2 operations x p keys x
heads x head_dim; causal, so p is s/2 on average, and again three times with backward:

    flops per token = 6 * (layer matrices + output head) + layers * 6 * s * heads * head_dim

The embedding is a look-up, so it is not counted; norms, rotary and soft-max are below 1 % and are not either. What
activation recompute repeats is no useful work: this is *model* FLOPs, the MFU of the papers, causal half only (some
report the full square, which at a million tokens nearly doubles their figure).

Worked example, Llama-3.1-8B: 6 x 7.50e9 = 45 GFLOP of matrices; attention adds 6.4 GFLOP at 8K tokens and
825 GFLOP at 1M: 95 % of the work there is attention.
"""

from __future__ import annotations

from megalong.config.architecture import Architecture


def matrix_entries(architecture: Architecture) -> int:
    """Weights that a token is multiplied with: all layers' matrices and the output head (tied or not)."""
    a = architecture
    projections = a.hidden_size * a.kv_channels * 2 * (a.num_attention_heads + a.num_query_groups)
    feed_forward = 3 * a.hidden_size * a.ffn_hidden_size
    return a.num_layers * (projections + feed_forward) + a.hidden_size * a.vocab_size


def flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Model FLOPs of one token, forward and backward, averaged over a causal sequence of `seq_length` tokens."""
    attention_width = architecture.num_attention_heads * architecture.kv_channels
    attention = 6 * architecture.num_layers * seq_length * attention_width
    return float(6 * matrix_entries(architecture) + attention)
