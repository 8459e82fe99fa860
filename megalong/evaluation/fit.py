"""Check before the weights are read whether an evaluation fits into memory.

Every rank holds the whole model and its context-parallel share of s tokens of each sample. Memory peaks at the loss:

    weights       parameters x b                          b bytes: 2 in bf16, 4 in float32
    hidden        s x hidden_size x b                     of the last layer, after the norm
    logits        s x padded vocabulary x b
    softmax       s x padded vocabulary x 4               a float32 copy if bf16; float32 is computed in place

Example, Llama 3.1 8B in bf16: 15.0 GiB of weights and 786 KB per token, so 80 GB are enough for about 80,000 tokens.
This is a lower bound: what is refused would certainly have run out of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalong.config.architecture import Architecture
from megalong.errors import UserError

if TYPE_CHECKING:
    import torch

_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes on each rank: `weights`, and `per_token` for each of its tokens of a sample."""

    weights: int
    per_token: int

    def total(self, seq_length: int, world: int) -> int:
        """Bytes per rank for a sample of `seq_length` tokens on `world` context-parallel ranks."""
        return self.weights + -(-seq_length // world) * self.per_token


def need_of(architecture: Architecture) -> Need:
    """The memory to measure this model's losses, in the dtype of its weights."""
    a, width = architecture, 4 if architecture.torch_dtype == "float32" else 2
    projections = a.hidden_size * a.kv_channels * 2 * (a.num_attention_heads + a.num_query_groups)
    layers = a.num_layers * (projections + 3 * a.hidden_size * a.ffn_hidden_size)
    tables = (1 if a.tie_word_embeddings else 2) * a.padded_vocab_size * a.hidden_size
    softmax = 0 if width == 4 else 4
    per_token = a.hidden_size * width + a.padded_vocab_size * (width + softmax)
    return Need((layers + tables) * width, per_token)


def refuse_what_cannot_fit(architecture: Architecture, seq_length: int, world: int, free: float, on_gpu: bool) -> None:
    """Refuse a measurement that needs more memory than is free.

    Args:
        free: bytes that each rank can use, on the rank with the least.
        on_gpu: whether they are GPU memory, else host memory.

    Raises:
        UserError: it does not fit; the message says what does.
    """
    need = need_of(architecture)
    total = need.total(seq_length, world)
    if total <= free:
        return
    parts = f"{need.weights / _GIB:.1f} of weights, {(total - need.weights) / _GIB:.1f} of logits"
    problem = (
        f"--seq-length {seq_length}: measuring needs {total / _GIB:.1f} GiB on each of {world} "
        f"{'GPU' if on_gpu else 'CPU'} processes ({parts}), and {free / _GIB:.1f} GiB are free there"
    )
    tokens = int(free - need.weights) // need.per_token
    if tokens < 1:
        raise UserError(f"{problem}: each holds the whole model; use {'GPUs' if on_gpu else 'hosts'} with more memory")
    shorter, processes = f"--seq-length {tokens * world} or less", -(-seq_length // tokens)
    if not on_gpu:  # more processes would share the same memory
        raise UserError(f"{problem}; write {shorter}, or use GPUs")
    raise UserError(
        f"{problem}; start at least {processes} processes, one GPU each (--nproc {processes}, or torchrun on several "
        f"nodes), or write {shorter}"
    )


def free_bytes(device: torch.device, local_world: int = 1) -> int:
    """Bytes that this process can still allocate: on its GPU, or its part of the host's memory.

    Args:
        local_world: processes of this host that share its memory.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available) // local_world
