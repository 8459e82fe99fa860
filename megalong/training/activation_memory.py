"""Refuse a run whose layer inputs alone exceed a rank's memory.

    bytes = micro-batch * tokens of a rank * hidden_size * bytes of a value * layers of a rank

With full recompute these are most of the activations, otherwise a small part; weights, gradients, optimizer and logits
come on top. So a run that passes may still not fit, but a run that is refused cannot fit. A mistyped length (100000000
instead of 1000000) gets a clear message instead of a failed allocation minutes later.
"""

from __future__ import annotations

import os

import psutil
import torch

from megalong.config.architecture import Architecture
from megalong.config.schema import Config
from megalong.errors import UserError

_GIB = 2**30


def layer_input_bytes(config: Config, architecture: Architecture) -> float:
    """Bytes of one micro-batch's layer inputs on the rank with the fewest layers."""
    parallel = config.parallel
    tokens = config.training.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    if parallel.sequence_parallel:
        tokens /= parallel.tensor_model_parallel_size
    layers = architecture.num_layers / parallel.pipeline_model_parallel_size
    return tokens * architecture.hidden_size * layers * (2 if config.precision.params_dtype == "bf16" else 4)


def refuse_without_memory(config: Config, architecture: Architecture, device: torch.device) -> None:
    """Refuse samples whose layer inputs alone are more than this rank's memory.

    Raises:
        UserError: with the bytes needed, the bytes available, and the length that would fit by this measure.
    """
    needed, available = layer_input_bytes(config, architecture), _memory(device)
    if needed <= available:
        return
    length, batch = config.data.seq_length, config.training.micro_batch_size
    raise UserError(
        f"data.seq_length {length}: a rank's layer inputs alone take {needed / _GIB:.1f} GiB for a micro-batch of "
        f"{batch}, and a rank has {available / _GIB:.1f} GiB; raise parallel.context_parallel_size, or write a "
        f"seq_length below {int(length * available / needed)}"
    )


def _memory(device: torch.device) -> int:
    """Bytes of this rank's GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
