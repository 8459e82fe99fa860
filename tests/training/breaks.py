"""Ways to break the trainer on purpose, one piece at a time, to see that the comparisons notice.

A break is a context manager around a whole run on every rank; it puts everything back, because the pool's workers live
on. Patches sit where the piece is looked up when it is used, hence the imports inside: Megatron-Core may only be
imported once a session has prepared the process for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from megalong.runtime import distributed
from tests.training.workers import train_steps

Break = Callable[[], AbstractContextManager[None]]


def train_broken(settings: dict[str, Any], steps: int, names: list[str]) -> list[dict[str, list[float]]]:
    """`train_steps` with one break of this module after the other, and last without any."""
    distributed.start(torch.device("cpu"))
    results = []
    for name in names:
        broken: Break = globals()[name]
        with broken():
            results.append(train_steps(settings, steps))
    return [*results, train_steps(settings, steps)]


@contextmanager
def dropped_gradient_reduce() -> Iterator[None]:
    """Data-parallel ranks keep the gradients of their own samples."""
    from megatron.core.distributed import DistributedDataParallel

    with patch.object(DistributedDataParallel, "finish_grad_sync", lambda *unused, **also_unused: None):
        yield


@contextmanager
def dropped_embedding_reduce() -> Iterator[None]:
    """The two copies of a tied table, on the first and the last stage, each keep their own gradient."""
    from megatron.core.distributed import finalize_model_grads as module_or_function

    # The package exports the function under the name of its module, so the module is found through the function.
    names = module_or_function.__globals__
    with patch.dict(names, {"_allreduce_word_embedding_grads": lambda *unused, **also_unused: None}):
        yield


@contextmanager
def swapped_zigzag_chunks() -> Iterator[None]:
    """One context-parallel rank reads its late chunk first; tokens, labels and positions still agree."""
    from megalong.batches import loader

    right = loader.batch_of

    def wrong(rows: Any, share: Any, plan: Any, own: Any) -> Any:
        made = right(rows, share, plan, own)
        if share.context_rank != 0:
            return made
        return made._with(lambda tensor: tensor.roll(tensor.shape[1] // 2, 1))

    with patch.object(loader, "batch_of", wrong):
        yield


@contextmanager
def zigzag_of_another_rank() -> Iterator[None]:
    """Every context-parallel rank reads rank 0's chunks."""
    from megalong.batches import loader

    right = loader.shard_of
    with patch.object(loader, "shard_of", lambda config, context_rank, window: right(config, 0, window)):
        yield


@contextmanager
def tokens_of_one_context_rank() -> Iterator[None]:
    """The gradient is divided by one context-parallel rank's tokens instead of all ranks'."""
    from megatron.core import parallel_state

    from megalong.training import step

    right = step.finalize_model_grads

    def wrong(model: Any, num_tokens: torch.Tensor, **options: Any) -> None:
        # Megatron-Core adds the ranks' counts up; shares of them add up to one rank's count.
        right(model, num_tokens // parallel_state.get_context_parallel_world_size(), **options)

    with patch.object(step, "finalize_model_grads", wrong):
        yield


@contextmanager
def undivided_gradient() -> Iterator[None]:
    """The gradient stays the sum over tokens."""
    from megalong.training import step

    right = step.finalize_model_grads
    with patch.object(step, "finalize_model_grads", lambda model, tokens, **options: right(model, None, **options)):
        yield


@contextmanager
def unmarked_norms() -> Iterator[None]:
    """Under sequence parallelism each rank keeps the norm weights' gradients of its own tokens."""
    from megalong.model.norm import RMSNorm

    right = RMSNorm.__init__

    def wrong(self: RMSNorm, *arguments: Any, **options: Any) -> None:
        right(self, *arguments, **options)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    with patch.object(RMSNorm, "__init__", wrong):
        yield


@contextmanager
def unmarked_slices() -> Iterator[None]:
    """Weights that are cut over tensor-parallel ranks pass for copies, and count once in the gradient norm."""
    from megalong.model import build

    def wrong(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    with patch.object(build, "mark_tensor_parallel", wrong):
        yield


@contextmanager
def slice_of_another_rank() -> Iterator[None]:
    """Every tensor-parallel rank loads rank 0's slices."""
    with _loaded_with(tp_rank=0):
        yield


@contextmanager
def layers_counted_from_zero() -> Iterator[None]:
    """Every pipeline stage loads the first layers."""
    with _loaded_with(layer_offset=0):
        yield


@contextmanager
def _loaded_with(**wrong: int) -> Iterator[None]:
    from megalong.hf import load

    right = load.load_into

    def load_into(module: Any, source: Any, architecture: Any, tp_rank: int, tp_size: int, layer_offset: int) -> None:
        options = {"tp_rank": tp_rank, "tp_size": tp_size, "layer_offset": layer_offset}
        right(module, source, architecture, **{**options, **wrong})

    with patch.object(load, "load_into", load_into):
        yield


@contextmanager
def positions_of_the_shard() -> Iterator[None]:
    """Rotary positions count a rank's own tokens from zero."""
    from megalong.model.attention_inputs import AttentionInputs

    def wrong(batch: Any) -> AttentionInputs:
        return AttentionInputs(positions=torch.arange(batch.positions.shape[1])[None], plan=batch.plan)

    with patch.object(AttentionInputs, "of", wrong):
        yield


@contextmanager
def same_samples_on_every_replica() -> Iterator[None]:
    """Data-parallel ranks all train on the first one's samples."""
    from megalong.batches.loader import Batches

    right = Batches.__init__

    def wrong(self: Batches, *arguments: Any) -> None:
        right(self, *arguments)
        self._order = replace(self._order, replica=0)

    with patch.object(Batches, "__init__", wrong):
        yield
