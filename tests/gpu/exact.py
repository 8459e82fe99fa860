"""Attention in float64 by its formulas, a head at a time, on the device of its inputs; and errors against it.

P = softmax(scale Q K^T)    O = P V
dV = P^T dO    dS = P (dO V^T - rowsum(dO O))    dQ = scale dS K    dK = scale dS^T Q
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, causal: bool, scale: float
) -> dict[str, torch.Tensor]:
    """out, dq `[n, b, h, d]`, dk, dv `[m, b, g, d]` and lse `[b, h, n]` in float64; causal from the top left corner."""
    n, batch, heads, _ = q.shape
    group = heads // k.shape[2]
    found = {
        name: torch.zeros_like(t, dtype=torch.float64) for name, t in (("out", q), ("dq", q), ("dk", k), ("dv", v))
    }
    lse = q.new_zeros((batch, heads, n), dtype=torch.float64)
    hidden = torch.ones(n, len(k), dtype=torch.bool, device=q.device).triu(1) if causal else None
    for b in range(batch):
        for h in range(heads):
            g = h // group
            q1, k1, v1, grad1 = (t.double() for t in (q[:, b, h], k[:, b, g], v[:, b, g], grad[:, b, h]))
            scores = scale * q1 @ k1.t()
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            lse[b, h] = scores.logsumexp(-1)
            p = (scores - lse[b, h, :, None]).exp()
            found["out"][:, b, h] = out = p @ v1
            ds = p * (grad1 @ v1.t() - (grad1 * out).sum(-1, keepdim=True))
            found["dq"][:, b, h] = scale * ds @ k1
            found["dk"][:, b, g] += scale * ds.t() @ q1
            found["dv"][:, b, g] += p.t() @ grad1
    return {**found, "lse": lse}


def relative_error(ours: torch.Tensor, true: torch.Tensor) -> float:
    """|ours - true| / |true| over all elements; NaN if there is one."""
    return float((ours.double() - true.double()).norm() / true.double().norm())


def poison(device: torch.device, like: Iterable[torch.Tensor]) -> None:
    """Leave NaN where the allocator will put tensors of such sizes next: what a kernel does not write shows."""
    left = [torch.full_like(t, torch.nan, device=device) for t in like for _ in range(2)]
    del left
