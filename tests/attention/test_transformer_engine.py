"""What Transformer Engine is asked for, by a stand-in that takes its arguments literally and attends in float64.

There is no GPU here: the stand-in has the names and meanings of version 2.20's arguments, and nothing of its kernels.
Calls are held against that version's own signatures (tests/signatures).
"""

from __future__ import annotations

import inspect
import math
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalong.attention import transformer_engine
from megalong.attention.exchange import ContextGroups
from megalong.attention.layout import TokenLayout, tokens_of
from megalong.attention.plan import make_plan
from megalong.attention.transformer_engine import EngineAttention, context_arguments, document_arguments, machine_of
from megalong.config.attention_checks import Machine
from megalong.errors import UserError
from tests.attention.reference import Case, dense, random_case
from tests.signatures import checked, signature_of


class DotProductAttention(torch.nn.Module):
    """As far as it is used. `window_size` (left, right) counts keys beside the query's own."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        layer_number: int | None = None,
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.window = window_size or (-1, 0)
        assert softmax_scale is not None
        self.scale = softmax_scale
        self.shape = (num_attention_heads, num_gqa_groups, kv_channels)

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        q, k, v = query_layer, key_layer, value_layer
        assert (q.shape[-2], k.shape[-2], q.shape[-1]) == self.shape
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return self.attend(q, k, v).flatten(2)
        assert (qkv_format, attn_mask_type, q.ndim) == ("thd", "padding_causal", 3)
        assert cu_seqlens_q is not None
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q is cu_seqlens_q_padded
        assert cu_seqlens_kv is cu_seqlens_kv_padded
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_kv.tolist()  # type: ignore[union-attr]
        assert max_seqlen_q == max_seqlen_kv == max(np.diff(bounds))
        assert bounds[-1] == len(q)
        parts = [self.attend(*(t[a:b, None] for t in (q, k, v)))[:, 0] for a, b in pairwise(bounds)]
        return torch.cat(parts).flatten(1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group_size = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group_size, dim=2) for t in (k, v))
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (distance >= -self.window[1]) & ((distance <= self.window[0]) | (self.window[0] < 0))
        scores = torch.einsum("ibhd,jbhd->bhij", q, k) * self.scale
        return torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    name = "transformer_engine.pytorch.DotProductAttention"
    module.DotProductAttention = checked(DotProductAttention, name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(transformer_engine, "_second_stream", lambda: "stream")


def engine(case: Case, window: int | None = None) -> EngineAttention:
    heads, groups, channels = case.q.shape[2], case.k.shape[2], case.q.shape[3]
    return EngineAttention(heads, groups, channels, case.scale, window, 1, ContextGroups(), None)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(
    "starts",
    [None, [np.array([0, 1, 17]), np.array([0, 30])], [np.array([0, 5, 6]), np.array([0, 5, 6])]],
    ids=["whole", "documents", "alike"],
)
def test_it_is_the_attention_that_is_meant(starts: list[np.ndarray] | None, window: int | None) -> None:
    case = random_case(3, 40, 2, 2, 3, 8, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    out = engine(case, window)(*leaves, make_plan(TokenLayout(), 40, starts))
    gradients = torch.autograd.grad(out, leaves, case.grad)
    for ours, true in zip((out, *gradients), dense(case, starts, window), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "heads_and_keys", [{"keys": 1}, {"keys": 1, "transport": "all_gather"}, {"heads": 1}, {"heads": 1, "keys": 1}]
)
def test_its_arguments_are_known_there(heads_and_keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an exchange and of documents, which a call has only by `**`."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    arguments = context_arguments(ContextGroups(**heads_and_keys), object())  # type: ignore[arg-type]
    made = signature_of("transformer_engine.pytorch.DotProductAttention")
    assert arguments.keys() <= made.parameters.keys()
    documents = document_arguments(make_plan(TokenLayout(), 12, [np.array([0, 8])]), 1, 1, torch.device("cpu"))
    called = signature_of("transformer_engine.pytorch.DotProductAttention.forward")
    assert documents.keys() <= called.parameters.keys()


def test_a_stand_in_has_the_real_ones_arguments() -> None:
    """By name, place and whether they can be left out, as far as it has them."""
    for ours, name in ((DotProductAttention.__init__, ""), (DotProductAttention.forward, ".forward")):
        real = signature_of(f"transformer_engine.pytorch.DotProductAttention{name}").parameters
        for one in list(inspect.signature(ours).parameters.values())[1:]:
            assert one.name in real
            if one.default is not inspect.Parameter.empty:
                assert real[one.name].default is not inspect.Parameter.empty


def test_exchanges_by_their_names_there(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, keys, whole = (object() for _ in range(3))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 5, 6, 7] if group is whole else [])

    def asked(**groups: Any) -> tuple[str, Any]:
        arguments = context_arguments(ContextGroups(**groups), whole)  # type: ignore[arg-type]
        assert arguments["cp_global_ranks"] == [4, 5, 6, 7]
        assert arguments["cp_stream"] == "stream"
        return arguments["cp_comm_type"], arguments["cp_group"]

    assert asked(keys=whole) == ("p2p", whole)
    assert asked(keys=whole, transport="all_gather") == ("all_gather", whole)
    assert asked(heads=whole) == ("a2a", whole)
    assert asked(heads=heads, keys=keys) == ("a2a+p2p", [heads, keys])
    assert context_arguments(ContextGroups(), None) == {}


def test_documents_lie_as_it_wants_them() -> None:
    """Its own example: documents of 8 and 4 tokens on two ranks."""
    plan = make_plan(TokenLayout(2, "per_document_zigzag"), 12, [np.array([0, 8])])
    assert [tokens_of(shard.runs).tolist() for shard in plan.sequences[0].shards] == [
        [0, 1, 6, 7, 8, 11],
        [2, 3, 4, 5, 9, 10],
    ]
    arguments = document_arguments(plan, 3, 2, torch.device("cpu"))
    assert arguments["cu_seqlens_q"].tolist() == [0, 8, 12, 20, 24, 32, 36]
    assert arguments["max_seqlen_q"] == 8


def test_what_it_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(TokenLayout(2, "per_document_zigzag"), 12, [np.array([0, 7])])
    with pytest.raises(UserError, match=r"documents of a multiple of 4 tokens, but one has 7; write backend: torch"):
        document_arguments(plan, 1, 2, torch.device("cpu"))
    document_arguments(plan, 1, 1, torch.device("cpu"))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    with pytest.raises(UserError, match=r"4 ranks cannot share 2 key heads .* write exchange: ring"):
        EngineAttention(8, 2, 16, 1.0, None, 1, ContextGroups(heads=object()), object())  # type: ignore[arg-type]


def test_a_cpu_is_a_machine_without_anything() -> None:
    assert machine_of(torch.device("cpu")) == Machine(None, False, "")
