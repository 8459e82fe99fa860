"""What stands around cuDNN's attention, with the operators played by the CPU's kernel.

The players are as strict as cuDNN: the log-sum-exp comes back with the dimensions that it left with, and a graph that
was compiled for one layout of the result reads any other wrongly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megalong.attention import cudnn_kernel, limits
from megalong.attention.kernels import CPU, CUDNN
from megalong.attention.layout import TokenLayout
from megalong.attention.mask import CAUSAL, FULL
from megalong.attention.plan import make_plan
from tests.attention import workers
from tests.attention.reference import assert_near, dense, random_case

ALONE = dataclasses.replace(CUDNN, varlen=None)


class Played:
    """torch's two operators on `[b, h, s, d]`; `dimensions` of the log-sum-exp, 3 or 4."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.graphs: dict[Any, Any] = {}
        self.calls = 0

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: None,
        compute_lse: bool,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float,
    ) -> tuple[Any, ...]:
        assert compute_lse
        out, lse = CPU.forward(*(tokens_first(t) for t in (q, k, v)), CAUSAL if causal else FULL, scale)
        self.calls += 1
        return out.permute(1, 2, 0, 3), lse.unsqueeze(-1) if self.dimensions == 4 else lse, None

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        seed: torch.Tensor,
        offset: torch.Tensor,
        bias: None,
        q_bounds: None,
        k_bounds: None,
        queries: int,
        keys: int,
        dropout: float,
        causal: bool,
        *,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        assert lse.dim() == self.dimensions
        assert (queries, keys) == (q.shape[2], k.shape[2])
        assert seed.dtype == offset.dtype == torch.int64
        graph = tuple((t.shape, t.stride()) for t in (q, k, v))
        layout = tuple(t.stride() for t in (out, grad_out, lse))
        assert self.graphs.setdefault(graph, layout) == layout, "the graph was compiled for another layout"
        self.calls += 1
        tensors = [tokens_first(t) for t in (grad_out, q, k, v, out)]
        lse = lse.squeeze(-1) if self.dimensions == 4 else lse
        grads = CPU.backward(*tensors, lse, CAUSAL if causal else FULL, scale)
        return tuple(t.permute(1, 2, 0, 3) for t in grads)


def tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(2, 0, 1, 3)


@pytest.fixture(params=[3, 4])
def played(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Played:
    player = Played(request.param)
    monkeypatch.setattr(cudnn_kernel, "_FORWARD", player.forward)
    monkeypatch.setattr(cudnn_kernel, "_BACKWARD", player.backward)
    return player


@pytest.mark.parametrize("starts", [((0,),), ((0, 256),)], ids=["one block", "blocks whose results are merged"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_log_sum_exp_goes_back_in_the_shape_it_came(
    played: Played, starts: tuple[tuple[int, ...]], batch: int
) -> None:
    case = random_case(0, 768, batch, 2, 2, 16, torch.float32)
    plan = make_plan(TokenLayout(), 768, [np.array(row) for row in starts * batch])
    assert_near(workers.attend(case, plan, kernel=ALONE), dense(case, [np.array(starts[0])] * batch), torch.float32)
    assert played.calls == 2 * len(starts[0])


def test_any_gradient_comes_in_one_layout(played: Played) -> None:
    """Of the same shapes, three gradients: as usual, expanded from a scalar, a view of something larger."""
    case = random_case(1, 256, 2, 1, 2, 16, torch.float32)
    wide = torch.randn(256, 2, 4, 16)
    for grad in (case.grad, torch.ones(()).expand(256, 2, 2, 16), wide[:, :, ::2]):
        out, lse = CUDNN.forward(case.q, case.k, case.v, CAUSAL, case.scale)
        grads = CUDNN.backward(grad, case.q, case.k, case.v, out, lse, CAUSAL, case.scale)
        case.grad = grad.contiguous()
        assert_near([out, *grads], dense(case), torch.float32)


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.empty(256, 1, heads, 64, device="meta") for heads in (8, 2))
    assert cudnn_kernel.supports(q, k, k, CAUSAL)
    assert cudnn_kernel.supports(q, torch.cat((k, k)), torch.cat((k, k)), FULL)
    assert not cudnn_kernel.supports(q, torch.cat((k, k)), torch.cat((k, k)), CAUSAL)
    assert not cudnn_kernel.supports(q[:255], k, k, FULL)


@pytest.mark.parametrize(("tokens", "heads", "taken"), [(2**22, 4, False), (2**22 - 256, 4, True), (2**20, 32, False)])
def test_2_to_the_31_elements_are_left_to_flash(tokens: int, heads: int, taken: bool) -> None:
    q, k = (torch.empty(tokens, 1, h, 128, dtype=torch.bfloat16, device="meta") for h in (heads, 1))
    assert cudnn_kernel.supports(q, k, k, CAUSAL) == taken


def test_strides_count_too() -> None:
    """A narrow view of a projection of 2^32 elements: its last element lies far behind its first."""
    projection = torch.empty(2**20, 1, 32, 128, dtype=torch.bfloat16, device="meta")
    narrow = projection[:, :, :1]
    assert narrow.numel() < limits.COUNTABLE
    assert not limits.is_countable(narrow)
    assert limits.is_countable(narrow.contiguous())
