"""Block kernels against float64 at shapes that reach cuDNN, which takes whole multiples of 256 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalong.attention.kernels import CPU, CUDNN, FLASH, TILED, BlockKernel, choose_kernel
from megalong.attention.mask import CAUSAL, FULL
from tests.gpu.exact import exact_attention, poison, relative_error
from tests.gpu.gpu_time import profiled
from tests.gpu.harness import Trial

MOST = {"out": 1e-2, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2, "lse": 1e-3}  # bf16 operands


@dataclass(frozen=True)
class Shape:
    """Queries, keys, batch, query heads, key heads, channels; `strided`: key and value are parts of wider tensors."""

    name: str
    queries: int
    keys: int
    heads: tuple[int, int]
    batch: int = 1
    channels: int = 128
    strided: bool = False

    @property
    def causal(self) -> bool:
        return self.queries == self.keys


SHAPES = [
    Shape("causal 256, 4:1", 256, 256, (4, 1)),
    Shape("causal 1024, 4:1, two rows", 1024, 1024, (4, 1), batch=2),
    Shape("causal 4096, 4:1", 4096, 4096, (4, 1)),
    Shape("causal 2048, 32:8", 2048, 2048, (32, 8)),
    Shape("causal 1024, 32:8, 64 channels", 1024, 1024, (32, 8), channels=64),
    Shape("whole 4096 x 2048, 4:1", 4096, 2048, (4, 1)),
    Shape("whole 256 x 4096, 32:8", 256, 4096, (32, 8)),
    Shape("causal 1024, 32:8, strided v", 1024, 1024, (32, 8), strided=True),
    Shape("whole 1024 x 512, 4:1, strided v", 1024, 512, (4, 1), strided=True),
    Shape("causal 300, 4:1, no multiple of 256", 300, 300, (4, 1)),
]


def run(trial: Trial) -> None:
    """Every kernel at every shape."""
    kernels = [CPU] if trial.rehearse else [CUDNN, FLASH]
    for index, shape in enumerate(SHAPES):
        inputs = _inputs(shape, trial, index)
        truth = exact_attention(*inputs, causal=shape.causal, scale=_scale(shape))
        for kernel in [*kernels, *([TILED] if index == 0 else [])]:
            with trial.part(f"{kernel.name}: {shape.name}"):
                _compare(trial, kernel, shape, inputs, truth)
    for kernel in kernels:
        with trial.part(f"{kernel.name}: names of its kernels"):
            _names(trial, kernel)
    if not trial.rehearse:
        with trial.part("raw log-sum-exp"):
            _raw_shapes(trial)


def _scale(shape: Shape) -> float:
    return 2 * shape.channels**-0.5  # scores with a standard deviation of 2


def _inputs(shape: Shape, trial: Trial, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(trial.device).manual_seed(seed)
    n, m = (max(4, t // 16) if trial.rehearse else t for t in (shape.queries, shape.keys))

    def normal(length: int, heads: int) -> torch.Tensor:
        size = (length, shape.batch, heads, shape.channels)
        return torch.randn(size, generator=generator, device=trial.device).to(torch.bfloat16)

    heads, groups = shape.heads
    q, grad = normal(n, heads), normal(n, heads)
    if shape.strided:  # as they lie in the output of a fused linear layer: q, k, v of a group side by side
        fused = normal(m, groups * 3).unflatten(2, (groups, 3))
        return q, fused[..., 0, :], fused[..., 1, :], grad
    return q, normal(m, groups), normal(m, groups), grad


def _compare(
    trial: Trial,
    kernel: BlockKernel,
    shape: Shape,
    inputs: tuple[torch.Tensor, ...],
    truth: dict[str, torch.Tensor],
) -> None:
    q, k, v, grad = inputs
    mask, scale = CAUSAL if shape.causal else FULL, _scale(shape)
    poison(trial.device, (q, truth["lse"].float()))
    out, lse = kernel.forward(q, k, v, mask, scale)
    poison(trial.device, (q, k, v))
    dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, mask, scale)
    found = {"out": out, "lse": lse.reshape(truth["lse"].shape), "dq": dq, "dk": dk, "dv": dv}
    errors = {name: relative_error(ours, truth[name]) for name, ours in found.items()}
    trial.near(f"{kernel.name}: {shape.name}", errors, MOST)


def _names(trial: Trial, kernel: BlockKernel) -> None:
    """Which kernels really ran: a fallback would go unseen otherwise."""
    q, k, v, grad = _inputs(SHAPES[1], trial, 0)

    def once() -> None:
        out, lse = kernel.forward(q, k, v, CAUSAL, 0.1)
        kernel.backward(grad, q, k, v, out, lse, CAUSAL, 0.1)

    once()
    names = [name[:80] for name, _ in profiled(once, trial.device).kernels.most_common(6)]
    trial.figure(f"{kernel.name} ran", names)
    if kernel is CUDNN:
        trial.check("cudnn ran cuDNN's kernels", any("cudnn" in name for name in names), ", ".join(names))
        chosen = choose_kernel(q)
        trial.figure("chosen", chosen.name, headline=True)


def _raw_shapes(trial: Trial) -> None:
    """As the operators give it; the product's kernels hand on `[b, h, n]`."""
    q, k, v, _ = (t.permute(1, 2, 0, 3) for t in _inputs(SHAPES[1], trial, 0))
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=0.1)
    trial.figure("cudnn's log-sum-exp", f"{cudnn[1].dtype} {tuple(cudnn[1].shape)} strides {cudnn[1].stride()}", True)
    trial.figure("cudnn's random state", [f"{t.dtype} {tuple(t.shape)} {t.device}" for t in cudnn[6:8]])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    flash = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=0.1
    )
    trial.figure("flash's log-sum-exp", f"{flash[1].dtype} {tuple(flash[1].shape)} strides {flash[1].stride()}", True)
