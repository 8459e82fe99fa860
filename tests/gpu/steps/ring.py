"""A ring of four context-parallel ranks in one process: plan, kernels, merge and gradients without a network.

Every rank is computed in turn by the product's own code; in place of the ring a transport hands it the keys of the
others, and adds up gradients where they belong. One call over the whole sequence must give the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.gpu.attention import document_starts

from megalong.attention.blockwise import BlockwiseAttention, blockwise_attention
from megalong.attention.exchange import ContextGroups, context_attention
from megalong.attention.kernels import choose_kernel
from megalong.attention.layout import Kind, TokenLayout, tokens_of
from megalong.attention.plan import AttentionPlan, make_plan
from megalong.attention.transport import Share
from tests.gpu.exact import relative_error
from tests.gpu.harness import Trial

RANKS, HEADS, GROUPS, CHANNELS = 4, 8, 2, 128
MOST = 2e-2  # both sides are computed in bf16


@dataclass
class LoopBack:
    """`Transport` of one of several ranks that all live here: their pairs, and the sums of their gradients."""

    rank: int
    pairs: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor]

    @property
    def size(self) -> int:
        return len(self.pairs)

    def pieces(self, pair: torch.Tensor, plan: AttentionPlan) -> Iterator[tuple[int, torch.Tensor]]:
        for step in range(self.size):
            source = (self.rank - step) % self.size
            yield source, self.pairs[source]

    def gradient(self, pair: torch.Tensor, plan: AttentionPlan, share: Share) -> torch.Tensor:
        for source, current in self.pieces(pair, plan):
            share(source, current)(self.gradients[source])
        return self.gradients[self.rank]


def run(trial: Trial) -> None:
    """Whole sequences, and documents under the layouts that a recipe may choose."""
    length = RANKS * trial.size(8192, 64)
    starts = document_starts(length, length / 8)
    cases: list[tuple[Kind, np.ndarray | None]] = [
        ("zigzag", None), ("zigzag", starts), ("per_document_zigzag", starts), ("balanced", starts)
    ]  # fmt: skip
    for kind, documents in cases:
        name = f"{kind}, {'one document' if documents is None else f'{len(documents)} documents'}"
        with trial.part(name):
            _compare(trial, name, length, kind, documents)


def _compare(trial: Trial, name: str, length: int, kind: Kind, documents: np.ndarray | None) -> None:
    generator = torch.Generator(trial.device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        size = (length, 1, heads, CHANNELS)
        return torch.randn(size, generator=generator, device=trial.device).to(torch.bfloat16)

    q, k, v, grad = normal(HEADS), normal(GROUPS), normal(GROUPS), normal(HEADS)
    rows, scale = None if documents is None else [documents], 2 * CHANNELS**-0.5
    kernel = choose_kernel(q)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    whole = context_attention(*leaves, make_plan(TokenLayout(), length, rows), ContextGroups(), kernel, scale)
    truth = [whole.detach(), *torch.autograd.grad(whole, leaves, grad)]

    plan = make_plan(TokenLayout(RANKS, kind), length, rows)
    places = [torch.from_numpy(tokens_of(shard.runs)).to(trial.device) for shard in plan.sequences[0].shards]
    pairs = [torch.stack((k[place], v[place])) for place in places]
    sums = [torch.zeros_like(pair, dtype=torch.float32) for pair in pairs]
    found = [torch.full_like(t, torch.nan) for t in (q, q, k, v)]
    for rank, place in enumerate(places):
        own = [t[place].requires_grad_() for t in (q, k, v)]
        out = blockwise_attention(*own, BlockwiseAttention(plan, LoopBack(rank, pairs, sums), kernel, scale))
        found[0][place] = out.detach()
        # Keys' gradients are whole when every rank has added its share: they are read off the sums below.
        found[1][place] = torch.autograd.grad(out, own, grad[place])[0]
    for place, total in zip(places, sums, strict=True):
        found[2][place], found[3][place] = (share.to(k.dtype) for share in total)
    names = ("out", "dq", "dk", "dv")
    errors = {part: relative_error(ours, true) for part, ours, true in zip(names, found, truth, strict=True)}
    trial.near(name, errors, MOST)
    if documents is None:
        trial.figure("largest error", max(errors.values()), headline=True)
