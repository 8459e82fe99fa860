"""Causal attention over sequences that no single rank holds.

    layout.py      how the tokens of a sequence lie on context-parallel ranks
    plan.py        which blocks of queries and keys a rank computes: causality, documents, windows (mask.py)
    exchange.py    ring, all-gather, ulysses or two levels of them (choice.py decides, transport.py and order.py move)
    blockwise.py   the blocks of a plan computed and merged by log-sum-exp, forward and backward (merge.py)
    kernels.py     a block on one device: the CPU's fused kernel, cuDNN, flash (varlen.py for many), plain tiles;
                   what a kernel cannot count to (limits.py), what is sent to a device once a micro-batch (upload.py)
    fp8.py         the same with operands rounded to 8 bits; transformer_engine.py does all of it by itself on a GPU
    (megalong/planning/balance.py reports how evenly ranks share the work of a run)

Tensors are in Megatron's order, `[sequence, batch, heads, head dimension]`.
"""
