"""Which implementation computes each part of a model here, and why not a faster one.

    part         on the CPU                    on a GPU, the fastest first
    attention    torch's fused CPU kernel      cuDNN (Hopper), FlashAttention-2, tiles in plain torch;
                                               Transformer Engine if configured
    linears      torch                         Transformer Engine (FP8), cuBLAS
    norm         torch's RMSNorm               torch's fused RMSNorm, or several kernels (older torch)
    activation   SwiGLU in tiles               a compiled SwiGLU, plain torch (if compilation fails)
    optimizer    torch's fused AdamW           FusedAdam of Transformer Engine, of apex, torch's fused AdamW

A slower choice changes the time of a step, never its result, so a run falls back instead of ending. It logs this at its
start, because a silent fallback wastes a cluster. `megalong doctor` prints the same choices.

torch is imported only for a GPU, so that `megalong doctor` stays instant on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from megalong.config.attention_checks import ENGINE, Machine
from megalong.runtime.doctor import gpus, is_nvidia_apex

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Choice:
    """The name of an implementation, and why the next faster one is not used (empty for the fastest)."""

    name: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


@dataclass(frozen=True)
class Implementations:
    """One choice for each part of a model, in the order in which they are reported."""

    device: Choice
    attention: Choice
    linears: Choice
    norm: Choice
    activation: Choice
    optimizer: Choice

    def __str__(self) -> str:
        """All choices in one log line."""
        return "; ".join(f"{name}: {choice}" for name, choice in self.rows())

    def rows(self) -> list[tuple[str, Choice]]:
        """Pairs of a part's name and its choice."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def implementations(
    device: torch.device | str,
    machine: Machine,
    dtype: str = "bf16",
    head_dim: int = 128,
    backend: str = "auto",
    fp8: str | None = None,
    fp8_attention: bool = False,
) -> Implementations:
    """The implementations that a model uses on `device`.

    Args:
        machine: the GPU's capability and whether Transformer Engine can be imported.
        dtype: `precision.params_dtype`.
        head_dim: channels of an attention head.
        backend: `attention.backend`.
        fp8, fp8_attention: `precision.fp8` and `precision.fp8_dot_product_attention`.
    """
    if machine.capability is None:
        return _on_cpu(fp8, fp8_attention)
    return Implementations(
        device=Choice(_gpu_name(device)),
        attention=_attention(device, dtype, head_dim, backend),
        linears=_linears(fp8),
        norm=_norm(),
        activation=_activation(device),
        optimizer=_optimizer(machine),
    )


def of_this_machine() -> list[tuple[str, str]]:
    """For `megalong doctor`: what a run with the default configuration uses, for bf16 and a head dimension of 128.

    Never raises: an error is shown in place of the choices.
    """
    try:
        found = _found_here()
    except Exception as error:
        return [("will use", f"unknown: {type(error).__name__}: {str(error).strip()[:200]}")]
    (_, device), *parts = found.rows()
    return [("will use", str(device)), *((f"  {name}", str(choice)) for name, choice in parts)]


def _found_here() -> Implementations:
    if not gpus():
        return implementations("cpu", Machine())
    import torch

    from megalong.attention.transformer_engine import machine_of
    from megalong.runtime.megatron import prepare

    device = torch.device("cuda", 0)
    prepare(device)
    return implementations(device, machine_of(device))


def _on_cpu(fp8: str | None, fp8_attention: bool) -> Implementations:
    rounded = f"emulated FP8 ({fp8})"
    return Implementations(
        device=Choice("CPU, gloo, Megatron-Core under the CPU adapter"),
        attention=Choice(rounded if fp8 and fp8_attention else "torch's fused CPU kernel"),
        linears=Choice(rounded if fp8 else "torch"),
        norm=Choice("torch's RMSNorm"),
        activation=Choice("SwiGLU in cache-sized tiles"),
        optimizer=Choice("torch's fused AdamW"),
    )


def _gpu_name(device: torch.device | str) -> str:
    import torch

    return f"{torch.cuda.get_device_name(device)}, NCCL"


def _attention(device: torch.device | str, dtype: str, head_dim: int, backend: str) -> Choice:
    if backend == ENGINE:
        return Choice("Transformer Engine")
    import torch

    from megalong.attention.kernels import kernel_of

    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    found = kernel_of(torch.empty(1, 1, 1, head_dim, dtype=types[dtype], device=device))
    return Choice(found.kernel.name, found.reason)


def _linears(fp8: str | None) -> Choice:
    if fp8 is not None:
        return Choice(f"Transformer Engine, FP8 ({fp8})")
    return Choice("cuBLAS", "precision.fp8 is null")


def _norm() -> Choice:
    import torch

    if hasattr(torch.ops.aten, "_fused_rms_norm"):
        return Choice("torch's fused RMSNorm")
    return Choice("torch's RMSNorm in several kernels", f"torch {torch.__version__} has no fused one; 2.9 has")


def _activation(device: torch.device | str) -> Choice:
    import torch

    from megalong.model.swiglu import why_not_compiled

    why = why_not_compiled(torch.device(device))
    return Choice("compiled SwiGLU") if why is None else Choice("SwiGLU in plain torch", why)


def _optimizer(machine: Machine) -> Choice:
    if machine.has_engine:
        return Choice("Transformer Engine's FusedAdam")
    missing = "Transformer Engine cannot be imported"
    if is_nvidia_apex():
        return Choice("apex's FusedAdam", missing)
    return Choice("torch's fused AdamW", f"{missing}, apex is not installed")
