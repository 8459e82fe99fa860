"""Which modules compute the parts of a Llama: one `Backend`, chosen once.

    precision         linears                                           core attention
    fp32, bf16        Megatron-Core's; widened on a CPU without bf16    ours, or Transformer Engine's
    FP8 on a CPU      operands rounded (fp8.py)                         ours; operands rounded too, if asked for
    FP8 on a GPU      Transformer Engine's                              ours, or Transformer Engine's

Norm, activation and the loss head depend only on the device. Megatron-Core chooses the optimizer (runtime/megatron.py).
`implementations.py` names all of them in a log line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megalong.config.attention_checks import ENGINE
from megalong.model.attention_backends import EmulatedFp8Attention, EngineCoreAttention
from megalong.model.config import LlamaConfig
from megalong.model.core_attention import CoreAttention
from megalong.model.cpu_bf16 import WidenedColumnParallelLinear, WidenedRowParallelLinear, widens
from megalong.model.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, engine_linears
from megalong.model.norm import RMSNorm
from megalong.model.swiglu import CompiledSwiGLU, SwiGLU, why_not_compiled


@dataclass(frozen=True)
class Backend:
    """Classes, each called as Megatron-Core calls its own class in that place.

    Attributes:
        column, row: linear layers of attention and MLP.
        output: hidden states to logits; never in FP8.
        attention: core attention.
    """

    column: type
    row: type
    output: type
    norm: type
    activation: type
    attention: type


def backend_of(config: LlamaConfig) -> Backend:
    """The modules for the current device."""
    device = torch.device(torch.cuda.current_device())
    compiles = device.type != "cpu" and why_not_compiled(device) is None
    column, row = ColumnParallelLinear, RowParallelLinear
    if widens(device, config.params_dtype):
        column, row = WidenedColumnParallelLinear, WidenedRowParallelLinear
    backend = Backend(
        column=column,
        row=row,
        output=column,
        norm=RMSNorm,
        activation=CompiledSwiGLU if compiles else SwiGLU,
        attention=EngineCoreAttention if config.attention == ENGINE else CoreAttention,
    )
    if config.emulated_fp8 is not None:
        attention = EmulatedFp8Attention if config.fp8_dot_product_attention else CoreAttention
        return replace(backend, column=Fp8ColumnParallelLinear, row=Fp8RowParallelLinear, attention=attention)
    if config.fp8 is not None:
        column, row = engine_linears()
        return replace(backend, column=column, row=row)
    return backend
