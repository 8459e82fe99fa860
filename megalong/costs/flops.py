"""Floating-point operations per token, counted from the model's shape alone.

A weight matrix of n entries costs 2n operations per token in forward (multiply, add) and twice that in backward: 6n.
Attention costs, per layer and token, 2 products (scores, values) x 2 operations x k keys x heads x head_dim in forward,
and three times that with backward. k is s/2 on average in a causal layer, and w - w^2/(2s) with a window of w tokens:
the first w tokens see w/2 on average, the others w.

    flops per token = 6 * (layer matrices + output head) + 12 * heads * head_dim * (sum over layers of k)

If documents are masked from each other, s is a document's length, and the result is averaged over the tokens of all
documents.

The embedding is a look-up and is not counted; nor are norms, rotary positions and softmax, which are below 1 %.
Activation recompute is no useful work: these are *model* FLOPs, as for MFU in papers, with the causal half only (some
report the full square, which nearly doubles their figure at a million tokens).

Worked example, Llama-3.1-8B: 6 x 7.50e9 = 45 GFLOP for matrices; attention adds 6.4 GFLOP at 8K tokens and 825 GFLOP at
1M, where it is 95 % of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megalong.config.architecture import Architecture


def matrix_entries(architecture: Architecture) -> int:
    """Number of weights that multiply a token: all layers' matrices and the output head (tied or not)."""
    a = architecture
    projections = a.hidden_size * a.kv_channels * 2 * (a.num_attention_heads + a.num_query_groups)
    feed_forward = 3 * a.hidden_size * a.ffn_hidden_size
    return a.num_layers * (projections + feed_forward) + a.hidden_size * a.vocab_size


def mean_flops_per_token(architecture: Architecture, lengths: Sequence[int]) -> float:
    """`flops_per_token` averaged over the tokens of documents of `lengths` tokens, at least one."""
    counted = Counter(lengths)
    total = sum(flops_per_token(architecture, length) * length * count for length, count in counted.items())
    return total / sum(lengths)


def flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Model FLOPs of one token, forward and backward, averaged over a causal sequence of `seq_length` tokens."""
    attention_width = architecture.num_attention_heads * architecture.kv_channels
    windows = [min(window or seq_length, seq_length) for window in architecture.layer_windows]
    keys = sum(window - window**2 / (2 * seq_length) for window in windows)
    return float(6 * matrix_entries(architecture) + 12 * attention_width * keys)
