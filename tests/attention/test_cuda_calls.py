"""Every operator that attention calls on a GPU, called on fake CUDA tensors: no GPU is needed, and nothing is computed.

torch checks names, types and number of arguments against its own declaration, and tells shapes, types and devices. A
tensor that was made on the wrong device fails here too. Run it under each torch there is: declarations differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.attention import transformer_engine, upload
from megalong.attention.blockwise import BlockwiseAttention
from megalong.attention.kernels import CUDNN, FLASH, TILED, BlockKernel
from megalong.attention.layout import TokenLayout
from megalong.attention.mask import CAUSAL, FULL, BlockMask
from megalong.attention.order import from_sequence_order, to_sequence_order
from megalong.attention.plan import make_plan
from megalong.attention.transport import Alone

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended GPU: tensors made on "cuda" have shapes only."""

    def uploaded(array: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    monkeypatch.setattr(upload, "to_device", uploaded)
    with FakeTensorMode():
        yield


@pytest.fixture
def indexing(gpu: None) -> None:
    """Python's brackets ask for the device itself, which a build of torch without CUDA does not know."""
    if torch.version.cuda is None:
        pytest.skip("fake CUDA tensors can be indexed only in a CUDA build of torch, which needs no GPU for it")


class Calls(TorchDispatchMode):
    """The operators called beneath it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))

    def attention(self) -> list[str]:
        return [name for name in self.names if "attention" in name]


def on_gpu(length: int, batch: int, heads: int, channels: int = 64) -> torch.Tensor:
    return torch.empty(length, batch, heads, channels, dtype=torch.bfloat16, device=GPU)


CUDNN_CALLS = ["_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"]
FLASH_CALLS = ["_flash_attention_forward", "_flash_attention_backward"]


@pytest.mark.parametrize(
    ("kernel", "keys", "mask", "calls"),
    [
        (FLASH, 256, CAUSAL, FLASH_CALLS),
        (FLASH, 512, FULL, FLASH_CALLS),
        (FLASH, 256, BlockMask(3, -2), FLASH_CALLS),
        (CUDNN, 256, CAUSAL, CUDNN_CALLS),
        (CUDNN, 512, FULL, CUDNN_CALLS),
        (CUDNN, 256, BlockMask(3, -2), FLASH_CALLS),
        (CUDNN, 512, BlockMask(upper=256), FLASH_CALLS),
        (CUDNN, 300, FULL, FLASH_CALLS),
    ],
)
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("gpu")
def test_blocks(
    kernel: BlockKernel, keys: int, mask: BlockMask, calls: list[str], heads: int, groups: int, batch: int
) -> None:
    q, k = on_gpu(256, batch, heads), on_gpu(keys, batch, groups)
    v = on_gpu(keys, batch, 3 * groups).narrow(2, 2 * groups, groups)  # as a split of one projection leaves it
    with Calls() as seen:
        out, lse = kernel.forward(q, k, v, mask, 0.1)
        gradients = kernel.backward(out, q, k, v, out, lse, mask, 0.1)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, GPU)
    assert (lse.shape, lse.dtype, lse.device) == ((batch, heads, 256), torch.float32, GPU)
    assert [(g.shape, g.device) for g in gradients] == [(t.shape, GPU) for t in (q, k, v)]
    assert seen.attention() == calls


@pytest.mark.usefixtures("indexing")
def test_plain_torch() -> None:
    q, k = on_gpu(256, 2, 8, 20), on_gpu(256, 2, 2, 20)
    out, lse = TILED.forward(q, k, k, BlockMask(3, -2), 0.1)
    gradients = TILED.backward(out, q, k, k, out, lse, BlockMask(3, -2), 0.1)
    assert [(t.shape, t.device) for t in (out, *gradients)] == [(t.shape, GPU) for t in (q, q, k, k)]


@pytest.mark.parametrize("kernel", [CUDNN, FLASH])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.usefixtures("indexing")
def test_documents_go_through_the_kernel_for_many(kernel: BlockKernel, window: int | None) -> None:
    plan = make_plan(TokenLayout(), 1024, [np.array([0, 3, 100, 512]), np.array([0, 700])])
    attention = BlockwiseAttention(plan, Alone(), kernel, 0.1, window)
    q, k = on_gpu(1024, 2, 8), on_gpu(1024, 2, 2)
    with Calls() as seen:
        kept = attention.forward(q, k, k)
        gradients = attention.backward(kept.out, q, k, k, kept)
    out, lse = kept
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (2, 8, 1024))
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, torch.float32) for t in (q, k, k)]
    # One launch for the row of four documents, one for the row of two, if no diagonal cuts them into more.
    assert window is not None or seen.attention() == [name for name in FLASH_CALLS for _ in range(2)]
    waiting = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}
    assert not waiting & set(seen.names), "the host would wait for the GPU"


@pytest.mark.usefixtures("indexing")
def test_whole_sequences_in_order_and_back() -> None:
    plan = make_plan(TokenLayout(2, "balanced"), 64, [np.array([0, 3]), np.array([0])])
    tokens = on_gpu(64, 2, 4)
    there = to_sequence_order(tokens, plan, slice(0, 2))
    assert (there.shape, there.device) == (tokens.shape, GPU)
    assert from_sequence_order(there, plan, slice(0, 2)).shape == tokens.shape


@pytest.mark.usefixtures("gpu")
def test_documents_for_transformer_engine() -> None:
    plan = make_plan(TokenLayout(), 64, [np.array([0, 3])])
    arguments = transformer_engine.document_arguments(plan, 2, 1, GPU)
    bounds = arguments["cu_seqlens_q"]
    assert (bounds.dtype, bounds.device, bounds.shape) == (torch.int32, GPU, (5,))
