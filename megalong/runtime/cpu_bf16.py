"""Matrix products of bf16 on a CPU that has no instructions for them.

Such a CPU (AVX2 and no more) takes ten times as long for a product of bf16 as for one of float32, because torch has
only a plain loop for it there. Here the operands are widened, multiplied as float32, and the result is rounded once,
which is what a GPU's tensor cores do with them.

    2048 x 128 by 128 x 384, one core, AVX2:    float32 50 GFLOP/s    bf16 4    bf16 through float32 50

The trade-off: `aten::mm` is replaced for the whole process, below autograd, so that Megatron-Core's linear layers need
no changes; products of other types pay for being asked their type, which would make a small model in float32 a fifth
slower. Hence it is in place only while the model built last is one of bf16. Attention and emulated FP8 compute in
float32 anyway.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

log = logging.getLogger("megalong")

_library: Any = None  # the replacement, while it is in place


def serve(dtype: torch.dtype) -> bool:
    """Make products suit a model of `dtype`: replaced for bf16, where the CPU is such a one and torch new enough to.

    Returns whether they are replaced now.
    """
    global _library
    if dtype is not torch.bfloat16:
        if _library is not None:
            _library._destroy()
            _library = None
        return False
    if _library is not None:
        return True
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or not hasattr(torch.library, "get_kernel"):
        return False
    log.info("this CPU has no bf16 matrix products: computing them in float32 and rounding (runtime/cpu_bf16.py)")
    _library = _replace()
    return True


def _replace() -> Any:
    """A library whose life is the replacement's."""
    plain = torch.library.get_kernel("aten::mm", "CPU")

    def product(keys: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype is torch.bfloat16 and right.dtype is torch.bfloat16:
            exact: torch.Tensor = plain.call_boxed(keys, left.float(), right.float())
            return exact.bfloat16()
        other: torch.Tensor = plain.call_boxed(keys, left, right)
        return other

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that something is replaced
        library.impl("mm", product, "CPU", with_keyset=True, allow_override=True)
    return library
