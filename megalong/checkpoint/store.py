"""Saving and loading a model, its optimizer, the LR schedule and random states with Megatron-Core's sharded format.

Tensors are stored by what they are (layer 3's `linear_qkv.weight`), not by which rank held them. So is the optimizer's
state when it is `fully_reshardable`: gathered over the data-parallel ranks at each save, which costs a moment then and
lets any layout load any other's checkpoint. `dp_reshardable` skips the gathering and binds the state to TP and PP.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megalong import __version__
from megalong.checkpoint.folder import ASSETS, META, Meta, SavedLayout, copy_assets, file_sizes, publish
from megalong.checkpoint.strategy import DirectSave
from megalong.errors import UserError
from megalong.model.build import unwrap
from megalong.runtime.distributed import is_main_rank
from megalong.runtime.megatron import version as megatron_version

log = logging.getLogger("megalong")

# What torch's zip writer says when the disk does not take what it writes.
_ZIP_WRITER = ("inline_container", "iostream error")


def save_weights(checkpoint: Path, chunks: list[torch.nn.Module], meta: Meta, assets: Path | None = None) -> None:
    """Write a checkpoint that holds weights only: what an import makes and a first start reads."""
    with _published(checkpoint, meta, assets) as folder:
        dist_checkpointing.save({"model": _model_state(chunks)}, str(folder), DirectSave())


def save_training(
    checkpoint: Path,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    meta: Meta,
    assets: Path | None = None,
) -> None:
    """Write everything a run needs to go on as if it had never stopped."""
    with _published(checkpoint, meta, assets) as folder:
        model, metadata = _model_state(chunks), _metadata(meta)
        state = {
            "model": model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata),
            "scheduler": scheduler.state_dict(),
            "random": _random_state(),
        }
        dist_checkpointing.save(state, str(folder), DirectSave(), content_metadata=metadata)


def load_weights(checkpoint: Path, chunks: list[torch.nn.Module]) -> None:
    """Fill the model's weights; the layout may differ from the one that saved them."""
    state = _load({"model": _model_state(chunks)}, checkpoint)
    _set_model_state(chunks, state["model"])


def load_training(checkpoint: Path, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any, meta: Meta) -> None:
    """Put model, optimizer, schedule and, where the layout is the same, random states back.

    Raises:
        UserError: the optimizer's state is bound to another layout, or missing.
    """
    _check_optimizer(checkpoint, meta)
    model = _model_state(chunks)
    wanted: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata(meta)),
    }
    same_layout = meta.layout == current_layout()
    if same_layout:
        wanted["random"] = _random_state()
    state = _load(wanted, checkpoint)
    _set_model_state(chunks, state["model"])
    with torch.no_grad():  # fp32 masters are views of the weights, which dp_reshardable copies into
        optimizer.load_state_dict(state["optimizer"])
    # Megatron-Core adds the saved count to what the schedule has counted already.
    scheduler.num_steps = 0
    scheduler.load_state_dict(state["scheduler"])
    if same_layout:
        _set_random_state(state["random"])


def current_layout() -> SavedLayout:
    """The layout this world runs under."""
    return SavedLayout(
        world_size=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def _metadata(meta: Meta) -> dict[str, Any]:
    return {"distrib_optim_sharding_type": meta.optimizer}


def _check_optimizer(checkpoint: Path, meta: Meta) -> None:
    if meta.optimizer is None:
        raise UserError(
            f"{checkpoint} holds weights only, nothing to resume from; start another run.dir from it with "
            f"model.load: {{checkpoint: {checkpoint}}}"
        )
    now, saved = current_layout(), meta.layout
    bound = (saved.tensor, saved.pipeline, saved.virtual)
    if meta.optimizer == "dp_reshardable" and (now.tensor, now.pipeline, now.virtual) != bound:
        raise UserError(
            f"{checkpoint} was saved with checkpoint.optimizer: dp_reshardable under TP {saved.tensor} × PP "
            f"{saved.pipeline} × {saved.virtual} virtual, this run has TP {now.tensor} × PP {now.pipeline} × "
            f"{now.virtual}: resume under the same, save once with fully_reshardable, and change the layout then"
        )


def versions() -> dict[str, str]:
    """The versions a checkpoint records of what wrote it."""
    return {"megalong": __version__, "megatron-core": megatron_version(), "torch": str(torch.__version__)}


@contextlib.contextmanager
def _published(checkpoint: Path, meta: Meta, assets: Path | None) -> Iterator[Path]:
    """A folder to write into, which becomes `checkpoint` once every rank has written and nothing was raised."""
    aside = checkpoint.with_name(checkpoint.name + ".tmp")
    try:
        if is_main_rank():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        yield aside
        dist.barrier()
        if is_main_rank():
            if assets is not None and assets.is_dir():
                copy_assets(assets, aside / ASSETS)
            described = meta.model_copy(update={"files": file_sizes(aside)})
            (aside / META).write_text(described.model_dump_json(indent=2) + "\n")
            publish(aside, checkpoint)
        dist.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint {checkpoint} could not be written ({reason}); checkpoints before it are untouched: make room "
            "or mend the disk, and start again"
        ) from error


def _disk_failure(error: BaseException) -> str | None:
    """What the disk said if that is why a save failed, None for anything else.

    Torch passes every rank's exceptions on in a CheckpointException; its zip writer turns what the disk says into a
    RuntimeError of its own.
    """
    causes = [one for one, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause).splitlines()[0]
        if isinstance(cause, RuntimeError) and any(part in str(cause) for part in _ZIP_WRITER):
            return "the disk took only a part: is it full?"
    return None


def _load(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(checkpoint))
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    except CheckpointException as error:
        causes = [one for one, _ in error.failures.values()]
        if not all(isinstance(one, OSError | EOFError | pickle.UnpicklingError) for one in causes):
            raise
        raise UserError(
            f"{checkpoint} is damaged ({type(causes[0]).__name__} in its tensor files); copy it again, or delete that "
            "folder to use the step before it"
        ) from error


def _model_state(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """One sharded state per part of the model; the tensors' keys do not depend on how many parts there are."""
    return {str(index): dict(unwrap(chunk).sharded_state_dict()) for index, chunk in enumerate(chunks)}


def _set_model_state(chunks: list[torch.nn.Module], state: dict[str, Any]) -> None:
    # Not strict: Megatron-Core's modules list empty `_extra_state` entries that only Transformer Engine fills.
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(state[str(index)], strict=False)
        wrong = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
        if wrong:
            raise RuntimeError(f"checkpoint and model disagree on {wrong[:3]}")


def _random_state() -> ShardedObject:
    """This rank's generators as one object; ranks do not share it."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    rank, world = dist.get_rank(), dist.get_world_size()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("random", state, (world,), (rank,))


def _set_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
