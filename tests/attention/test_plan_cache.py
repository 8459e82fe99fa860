"""What a micro-batch's layers share: indices made and sent to the device by the first of them, and never again."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest.mock import call, create_autospec

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.attention import upload, varlen
from megalong.attention.layout import TokenLayout
from megalong.attention.order import from_sequence_order, to_sequence_order
from megalong.attention.plan import AttentionPlan, make_plan
from megalong.attention.transformer_engine import document_arguments
from tests.attention import workers
from tests.attention.reference import assert_near, dense
from tests.attention.test_varlen import PLAIN
from tests.attention.workers import Setting

CPU = torch.device("cpu")
# Rows with documents of their own; with a window their blocks take several launches, whose tokens do not lie together.
SETTING = Setting(0, 96, 2, 2, 8, ((0, 3, 40, 41), (0, 50)), window=20)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every array that is sent to a device."""
    sent: list[np.ndarray] = []
    real = upload.to_device
    monkeypatch.setattr(upload, "to_device", lambda array, device: sent.append(array) or real(array, device))  # type: ignore[func-returns-value]
    return sent


def test_layers_after_the_first_upload_nothing(uploads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    packings = []
    real = varlen.Launch.on
    monkeypatch.setattr(varlen.Launch, "on", lambda self, device: packings.append(1) or real(self, device))  # type: ignore[func-returns-value]
    case, plan = SETTING.case(), SETTING.plan(1)
    truth = dense(case, SETTING.rows, SETTING.window)
    assert_near(workers.attend(case, plan, window=SETTING.window, kernel=PLAIN), truth, torch.float32)
    first, made = len(uploads), len(packings)
    assert made > 0
    assert first <= 3 * made  # bounds, and indices of queries and keys where they do not lie together
    for _ in range(3):
        assert_near(workers.attend(case, plan, window=SETTING.window, kernel=PLAIN), truth, torch.float32)
    assert (len(uploads), len(packings)) == (first, made)
    workers.attend(case, SETTING.plan(1), window=SETTING.window, kernel=PLAIN)  # the next micro-batch
    assert len(uploads) == 2 * first


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def test_nothing_is_made_or_waited_for_in_the_second_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around a kernel that launches nothing, only copies by index are left: what makes indices or waits is gone."""
    kernel = varlen.VarlenKernel(
        lambda q, k, v, packed, scale: (torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))),
        lambda grad, q, k, v, out, lse, packed, scale: tuple(map(torch.zeros_like, (q, k, v))),
    )
    silent = type(PLAIN)("silent", PLAIN.forward, PLAIN.backward, kernel)
    setting = Setting(0, 96, 2, 2, 8, ((0, 3, 40, 41), (0, 50)))
    case, plan = setting.case(), setting.plan(1)
    workers.attend(case, plan, kernel=silent)
    with Operators() as seen:
        workers.attend(case, plan, kernel=silent)
    assert not seen.names & {"arange", "cumsum", "cat", "lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero"}


def test_documents_that_lie_together_are_not_copied() -> None:
    """A masked pack on one rank: its documents are all there is, in order, and the kernel reads them where they lie."""
    (_, blocks), = make_plan(TokenLayout(), 96, [np.array([0, 3, 40])]).blocks(0, 0, None)  # fmt: skip
    (launch,) = varlen.launches(blocks)
    packed = launch.on(CPU)
    assert packed.queries == packed.keys == slice(0, 96)
    assert packed.query_bounds.tolist() == packed.key_bounds.tolist() == [0, 3, 40, 96]
    assert (packed.longest_queries, packed.longest_keys) == (56, 56)


def test_tokens_that_lie_apart_are_indexed() -> None:
    """Rank 0 of two holds 0-3 and 12-15; of rank 1's 4-11, its queries 12-15 see keys of both documents' starts."""
    (_, blocks), = make_plan(TokenLayout(2), 16, [np.array([0, 6, 10, 13])]).blocks(0, 1, None)  # fmt: skip
    starts = [(block.queries, block.keys) for block in blocks]
    assert starts == [(slice(4, 5), slice(6, 8))]  # token 12 sees 10 and 11; 13 begins a document
    launch = varlen.Launch((-1, -1), [*blocks, type(blocks[0])(slice(6, 8), slice(1, 3), blocks[0].mask)])
    packed = launch.on(CPU)
    assert packed.queries.tolist() == [4, 6, 7]  # type: ignore[union-attr]
    assert packed.keys.tolist() == [6, 7, 1, 2]  # type: ignore[union-attr]
    assert packed.query_bounds.tolist() == [0, 1, 3]
    assert packed.key_bounds.dtype == torch.int32


def test_orders_are_uploaded_once_for_each_direction(uploads: list[np.ndarray]) -> None:
    plan = make_plan(TokenLayout(2, "balanced"), 64, [np.array([0, 5]), np.array([0, 20])])
    tokens = torch.arange(128.0).reshape(64, 2)
    for _ in range(3):
        there = to_sequence_order(tokens, plan, slice(0, 2))
        assert torch.equal(from_sequence_order(there, plan, slice(0, 2)), tokens)
    assert len(uploads) == 4  # two rows, there and back


def test_transformer_engines_documents_are_uploaded_once(uploads: list[np.ndarray]) -> None:
    plan = make_plan(TokenLayout(), 64, [np.array([0, 5])])
    first = document_arguments(plan, 2, 1, CPU)
    assert document_arguments(plan, 2, 1, CPU)["cu_seqlens_q"] is first["cu_seqlens_q"]
    assert document_arguments(plan, 3, 1, CPU)["cu_seqlens_q"] is not first["cu_seqlens_q"]
    assert len(uploads) == 2


def test_what_is_kept_goes_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    real = upload.to_device

    def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
        tensor = real(array, device)
        kept.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(upload, "to_device", sent)
    plan: AttentionPlan | None = SETTING.plan(1)
    workers.attend(SETTING.case(), plan, window=SETTING.window, kernel=PLAIN)  # type: ignore[arg-type]
    assert kept
    del plan
    gc.collect()
    assert all(tensor() is None for tensor in kept)


def test_an_upload_to_a_gpu_is_from_pinned_memory_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = create_autospec(torch.Tensor, instance=True)
    monkeypatch.setattr(torch, "from_numpy", lambda array: tensor)
    upload.to_device(np.zeros(3), torch.device("cuda", 0))
    assert tensor.mock_calls == [call.pin_memory(), call.pin_memory().to(torch.device("cuda", 0), non_blocking=True)]
