"""Dense causal attention in float64, and the random tensors that attention is compared on."""

import math
from dataclasses import dataclass

import torch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """Leaf tensors of one attention call and the gradient that comes from above."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    scale: float

    def on(self, indices: torch.Tensor) -> "Case":
        """The tokens of one rank."""
        return Case(self.q[indices], self.k[indices], self.v[indices], self.grad[indices], self.scale)


def random_case(
    seed: int, length: int, batch: int, groups: int, group_size: int, head_dim: int, dtype: torch.dtype
) -> Case:
    """Scores with a standard deviation of 2, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(length, batch, heads, head_dim, generator=generator).to(dtype)

    heads = groups * group_size
    return Case(normal(heads), normal(groups), normal(groups), normal(heads), 2 / math.sqrt(head_dim))


def dense(case: Case) -> list[torch.Tensor]:
    """[out, grad_q, grad_k, grad_v] in float64, by all scores at once and torch's own derivative."""
    q, k, v = (t.double().requires_grad_() for t in (case.q, case.k, case.v))
    group_size = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(group_size, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, keys) * case.scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(later, -math.inf).softmax(-1), values)
    gradients = torch.autograd.grad(out, (q, k, v), case.grad.double())
    return [out.detach(), *gradients]


def assert_near(ours: list[torch.Tensor], truth: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Each tensor within the type's tolerance of the truth as a whole, and no element of it three times as far off.

    The single element is judged by the largest one. It gets more room because a result that was rounded to bf16 once
    moves all gradients of its query: with a handful of keys that does not average out.
    """
    for name, mine, true in zip(("out", "grad_q", "grad_k", "grad_v"), ours, truth, strict=True):
        assert mine.shape == true.shape, name
        difference = mine.double() - true
        error = (difference.norm() / true.norm().clamp(min=1)).item()
        worst = (difference.abs().max() / true.abs().max().clamp(min=1)).item()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} as a whole"
        assert worst <= 3 * TOLERANCE[dtype], f"{name} is off by {worst:.1e} in one place"
