"""The gradient of every weight, under any layout and by plain transformers, under its Hugging Face name.

A rank answers with slices: which rows or columns of which Hugging Face tensor it holds the gradient of. Nothing is
put together before it is compared, so that a rank whose copy is wrong is seen even if another's is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalong.config.schema import Config
from megalong.data.samples.sampler import PackedSamples
from tests.training.workers import _session


@dataclass(frozen=True)
class Slice:
    """Rows (`dim` 0) or columns (`dim` 1) of the gradient of the Hugging Face tensor `tensor`, from `start` on."""

    tensor: str
    dim: int
    start: int
    values: np.ndarray


def rank_gradients(settings: dict[str, Any]) -> tuple[list[Slice], float]:
    """This rank's gradients of the first global batch, reduced but not clipped, and the largest one of padding rows."""
    with _session(settings) as session:
        from megatron.core import parallel_state

        from megalong.batches.loader import Batches
        from megalong.hf.weight_map import local_parameter
        from megalong.model.build import unwrap
        from megalong.training.step import TrainStep

        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        for chunk in session.chunks:
            chunk.zero_grad_buffer()
        batches = Batches(session.config, lambda: samples_of(session.config), session.device)
        step.gradients(batches.at(0))
        slices, padding = [], 0.0
        for chunk in map(unwrap, session.chunks):
            for name, parameter in chunk.named_parameters():
                layout = local_parameter(name, session.architecture, tensor_rank, tensor_size, chunk.first_layer)
                rest = parameter.main_grad.clone()
                for piece in layout.pieces:
                    values = parameter.main_grad.narrow(piece.dim, piece.local_start, piece.length)
                    slices.append(Slice(piece.tensor, piece.dim, piece.hf_start, values.numpy().copy()))
                    rest.narrow(piece.dim, piece.local_start, piece.length).zero_()
                padding = max(padding, rest.abs().max().item())
        return slices, padding


def samples_of(config: Config) -> PackedSamples:
    """The training samples of a run."""
    data = config.data
    return PackedSamples(data.mixture, data.seq_length, config.run.seed, data.split, "train", packing=data.packing)


def global_batches(settings: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The run's global batches, int64 [batch, S+1], read without any of the trainer's code but the sampler."""
    config = Config.model_validate(settings)
    samples, size = samples_of(config), config.training.global_batch_size
    for first in range(0, config.training.train_iters * size, size):
        yield torch.from_numpy(np.stack([samples.row(first + row).tokens[:] for row in range(size)]))


def plain_llama(hf: Path, attention: str = "eager") -> Any:
    """The transformers model of the folder `hf`, float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation=attention)


def plain_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every next token in `batch` [batch, S+1], by torch on the model's logits."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def plain_gradients(hf: Path, batch: torch.Tensor) -> dict[str, np.ndarray]:
    """Gradient of `plain_loss` by Hugging Face name; a tied model's table bears the embedding's."""
    model = plain_llama(hf)
    plain_loss(model, batch).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def adapter_gradients(settings: dict[str, Any]) -> list[Slice]:
    """This rank's gradients of the adapters for the first global batch; all that has a gradient is among them."""
    with _session(settings) as session:
        from megatron.core import parallel_state

        from megalong.batches.loader import Batches
        from megalong.hf.adapter import tensor_names
        from megalong.model.build import unwrap
        from megalong.model.lora import adapters
        from megalong.training.step import TrainStep

        rank = parallel_state.get_tensor_model_parallel_rank()
        step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        for chunk in session.chunks:
            chunk.zero_grad_buffer()
        batches = Batches(session.config, lambda: samples_of(session.config), session.device)
        step.gradients(batches.at(0))
        slices, found = [], 0
        for adapter in (one for chunk in session.chunks for one in adapters(unwrap(chunk))):
            for name, parameter, cut in zip(
                tensor_names(adapter.module),
                (adapter.a, adapter.b),
                (adapter.columns, not adapter.columns),
                strict=True,
            ):
                dim = int(name.endswith("lora_A.weight"))
                start = rank * parameter.shape[dim] if cut else 0
                slices.append(Slice(name, dim, start, parameter.main_grad.numpy().copy()))
                found += 1
        learning = [p for chunk in session.chunks for p in chunk.parameters() if p.requires_grad]
        assert len(learning) == found
        return slices
