"""Causal attention over sequences that no single rank holds.

    layout.py    which tokens a context-parallel rank holds, and which of them see which
    kernels.py   exact attention of some queries to some keys on one device, with log-sum-exp
    tiled.py     the same in plain torch, for what no fused kernel takes
    ring.py      the blocks of one sequence, passed round the context-parallel group and merged

Tensors are in Megatron's order, `[sequence, batch, heads, head dimension]`.
"""
