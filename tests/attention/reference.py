"""Dense causal attention in float64, and the random tensors that attention is compared on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megalong.attention.layout import tokens_of
from megalong.attention.plan import AttentionPlan

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """Leaf tensors of one attention call and the gradient that comes from above."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    scale: float

    def on(self, plan: AttentionPlan, rank: int) -> "Case":
        """The tokens of one rank."""
        parts = [tokens_of_rank(t, plan, rank) for t in (self.q, self.k, self.v, self.grad)]
        return Case(*parts, self.scale)


def tokens_of_rank(tensor: torch.Tensor, plan: AttentionPlan, rank: int) -> torch.Tensor:
    """A rank's tokens of `[S, b, ...]`, which may be others in every row."""
    pieces = [tensor[torch.from_numpy(tokens_of(sequence.shards[rank].runs)), rows] for rows, sequence in plan.rows()]
    return torch.cat(pieces, 1)


def whole(pieces: Sequence[torch.Tensor], plan: AttentionPlan) -> torch.Tensor:
    """`[S, b, ...]` from every rank's tokens."""
    out = torch.zeros(sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:], dtype=pieces[0].dtype)
    for rows, sequence in plan.rows():
        for piece, shard in zip(pieces, sequence.shards, strict=True):
            out[torch.from_numpy(tokens_of(shard.runs)), rows] = piece[:, rows]
    return out


def random_case(
    seed: int, length: int, batch: int, groups: int, group_size: int, head_dim: int, dtype: torch.dtype
) -> Case:
    """Scores with a standard deviation of 2, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(length, batch, heads, head_dim, generator=generator).to(dtype)

    heads = groups * group_size
    return Case(normal(heads), normal(groups), normal(groups), normal(heads), 2 / math.sqrt(head_dim))


def visible(length: int, starts: np.ndarray, window: int | None) -> torch.Tensor:
    """Bool `[S, S]`: query i sees key j: before it, in its document, in its window."""
    place = torch.arange(length)
    document = torch.from_numpy(np.searchsorted(starts, place.numpy(), side="right"))
    seen = (place[:, None] >= place) & (document[:, None] == document)
    return seen if window is None else seen & (place[:, None] - place < window)


def dense(case: Case, starts: Sequence[np.ndarray] | None = None, window: int | None = None) -> list[torch.Tensor]:
    """[out, grad_q, grad_k, grad_v] in float64, by all scores at once and torch's own derivative.

    `starts`: first tokens of every row's documents; None: one document.
    """
    q, k, v = (t.double().requires_grad_() for t in (case.q, case.k, case.v))
    group_size = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(group_size, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, keys) * case.scale
    rows = starts if starts is not None else [np.zeros(1, np.int64)] * q.shape[1]
    seen = torch.stack([visible(q.shape[0], row, window) for row in rows])[:, None]
    out = torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(~seen, -math.inf).softmax(-1), values)
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
        # Inputs have a standard deviation of 1. A query that sees one key or two has a gradient of (nearly) zero by
        # cancellation, and what is left is the rounding of terms of that size.
        error = (difference.norm() / true.norm().clamp(min=true.numel() ** 0.5)).item()
        worst = (difference.abs().max() / true.abs().max().clamp(min=1)).item()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} as a whole"
        assert worst <= 3 * TOLERANCE[dtype], f"{name} is off by {worst:.1e} in one place"
