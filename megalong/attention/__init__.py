"""Causal attention over sequences that are split over context-parallel ranks.

    layout.py      which tokens of a sequence lie on which context-parallel rank
    plan.py        which blocks of queries and keys a rank computes: causality, documents, windows (mask.py)
    exchange.py    ring, all-gather, ulysses or both levels; config/exchange.py chooses, transport.py and order.py move
    blockwise.py   computes the blocks of a plan and merges them by log-sum-exp (merge.py), forward and backward
    kernels.py     one block on one device: the CPU's fused kernel, cuDNN, flash (varlen.py for many), plain tiles;
                   32-bit limits of kernels (limits.py), uploads to a device once per micro-batch (upload.py)
    fp8.py         the same with operands rounded to 8 bits; transformer_engine.py does all of this itself on a GPU
    (megalong/planning/balance.py reports how evenly a run's work is spread over ranks)

Tensors are in Megatron's order, `[sequence, batch, heads, head dimension]`.
"""
