"""Save and load a model, its optimizer, the LR schedule and random states in Megatron-Core's sharded format.

Tensors are stored by name (layer 3's `linear_qkv.weight`), not by rank. So is the optimizer's state if it is
`fully_reshardable`: each rank saves what it holds, and any layout loads a checkpoint of any other (`optimizer_state`).
`dp_reshardable` stores Megatron-Core's buffers as they are, which binds the state to TP and PP.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megalong import __version__
from megalong.checkpoint.data_only import refusal
from megalong.checkpoint.folder import DamagedError, Meta, SavedLayout, read_meta
from megalong.checkpoint.groups import use_configured
from megalong.checkpoint.optimizer_state import FORM, optimizer_state
from megalong.checkpoint.reading import direct_reading
from megalong.checkpoint.strategy import DeferredSave
from megalong.checkpoint.verification import Verification
from megalong.checkpoint.writing import Begun, begin, complete, gathered
from megalong.config.lora import is_adapter
from megalong.errors import UserError
from megalong.model.build import unwrap
from megalong.runtime import distributed
from megalong.runtime.megatron import version as megatron_version
from megalong.runtime.random_states import random_states, restore

log = logging.getLogger("megalong")

_SHARDS = "optimizer_shards"


def save_weights(checkpoint: Path, chunks: list[torch.nn.Module], meta: Meta, assets: Path | None = None) -> None:
    """Write a weights-only checkpoint, as `megalong checkpoint import` does."""
    complete(begin(checkpoint, {"model": _model_state(chunks)}, meta, assets))


def begin_training(
    checkpoint: Path,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    meta: Meta,
    assets: Path | None = None,
    strategy: DeferredSave | None = None,
) -> Begun:
    """Collect everything that a bit-exact resume needs. `complete` writes it; see `begin`."""
    model, metadata = _model_state(chunks), _metadata(meta)
    _init_moments(optimizer)
    state = {"model": model, "scheduler": scheduler.state_dict(), "random": _random_state()}
    sharded = _sharded_optimizer(optimizer, meta)
    if sharded is None:
        state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
    else:
        state["optimizer"] = {**sharded.state_dict(), "param_state_sharding_type": FORM}
        state[_SHARDS] = optimizer_state(sharded, model).shards
    return begin(checkpoint, state, meta, assets, strategy, content_metadata=metadata)


def load_weights(checkpoint: Path, chunks: list[torch.nn.Module]) -> None:
    """Fill the model's weights; the layout may differ from the one that saved them.

    Adapters are filled only if the checkpoint has some.
    """
    verification = Verification(checkpoint)
    model = _model_state(chunks)
    with_adapters = read_meta(checkpoint).lora is not None
    if not with_adapters:
        model = {index: {k: v for k, v in part.items() if not is_adapter(k)} for index, part in model.items()}
    state = _load({"model": model}, checkpoint, verification)
    _set_model_state(chunks, state["model"], with_adapters)


def load_training(
    checkpoint: Path,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    meta: Meta,
    verification: Verification,
) -> None:
    """Restore model, optimizer, schedule and, under the same layout, random states.

    Hyper-parameters are not restored: `optimizer` and `scheduler` keep the configured ones.

    Args:
        verification: the running verification of this checkpoint; this function finishes it.

    Raises:
        UserError: the optimizer's state is bound to another layout, or missing.
        DamagedError: the checkpoint is not as it was written; the model and the optimizer may hold parts of it.
    """
    _check_optimizer(checkpoint, meta)
    model = _model_state(chunks)
    wanted: dict[str, Any] = {"model": model}
    sharded, direct = _sharded_optimizer(optimizer, meta), None
    if sharded is None:
        wanted["optimizer"] = optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata(meta))
    else:
        _init_moments(optimizer)
        direct = optimizer_state(sharded, model, loading=True)
        wanted[_SHARDS] = direct.shards
    same_layout = meta.layout == current_layout()
    if same_layout:
        wanted["random"] = _random_state()
    state = _load(wanted, checkpoint, verification)
    _set_model_state(chunks, state["model"])
    use_configured(state["optimizer"], optimizer.param_groups)
    if direct is not None:
        direct.finish()
        state["optimizer"].pop("param_state", None)  # empty dictionaries in Megatron-Core's own checkpoints
    with torch.no_grad():  # fp32 masters are views of the weights, which dp_reshardable copies into
        optimizer.load_state_dict(state["optimizer"])
    # Megatron-Core adds the saved count to the schedule's current count.
    scheduler.num_steps = 0
    scheduler.load_state_dict(state["scheduler"])
    if same_layout:
        restore(state["random"])


def current_layout() -> SavedLayout:
    """The layout this world runs under."""
    grid = distributed.grid()
    return SavedLayout(
        world_size=dist.get_world_size(),
        tensor=grid.tensor,
        context=grid.context,
        pipeline=grid.pipeline,
        virtual=grid.virtual,
    )


def _metadata(meta: Meta) -> dict[str, Any]:
    return {"distrib_optim_sharding_type": meta.optimizer}


def _sharded_optimizer(optimizer: Any, meta: Meta) -> DistributedOptimizer | None:
    """The optimizer whose shards are stored one by one; None if Megatron-Core stores the state in its own format."""
    (one,) = getattr(optimizer, "chained_optimizers", [optimizer])  # more than one only with experts
    return one if meta.optimizer == FORM and isinstance(one, DistributedOptimizer) else None


def _init_moments(optimizer: Any) -> None:
    """Initialize missing moments to zero, as AdamW does at its first update; they are missing before any update."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.optimizer is not None:
            one.init_state_fn(one.optimizer, one.config)


def _check_optimizer(checkpoint: Path, meta: Meta) -> None:
    if meta.optimizer is None:
        raise UserError(
            f"{checkpoint} contains only weights, so it cannot be resumed; start another run.dir from it with "
            f"model.load: {{checkpoint: {checkpoint}}}"
        )
    now, saved = current_layout(), meta.layout
    bound = (saved.tensor, saved.pipeline, saved.virtual)
    if meta.optimizer == "dp_reshardable" and (now.tensor, now.pipeline, now.virtual) != bound:
        raise UserError(
            f"{checkpoint} was saved with checkpoint.optimizer: dp_reshardable under TP {saved.tensor} × PP "
            f"{saved.pipeline} × {saved.virtual} virtual, this run has TP {now.tensor} × PP {now.pipeline} × "
            f"{now.virtual}: resume under the same layout, save once with fully_reshardable, then change the layout"
        )


def versions() -> dict[str, str]:
    """Versions of the software that writes a checkpoint."""
    return {"megalong": __version__, "megatron-core": megatron_version(), "torch": str(torch.__version__)}


def _refuse_code(checkpoint: Path) -> None:
    """Refuse a checkpoint that contains code; every rank checks a share of its files."""
    try:
        mine = refusal(checkpoint, dist.get_rank(), dist.get_world_size())
    except (OSError, RuntimeError, ValueError, EOFError) as error:  # the bytes may be damaged
        mine = f"{checkpoint} cannot be read ({type(error).__name__}); copy it again"
    for reason in gathered(mine):
        if reason is not None:
            raise UserError(reason)


def _load(wanted: dict[str, Any], checkpoint: Path, verification: Verification) -> dict[str, Any]:
    """Load and verify `wanted`. If a file is damaged, the error reports the damage, not a consequence of it."""
    state: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        _refuse_code(checkpoint)
        with direct_reading(verification):
            state = dist_checkpointing.load(wanted, str(checkpoint))
    except Exception as error:
        failure = error
    verification.finish()
    if failure is not None:
        raise _load_error(failure, checkpoint) from failure
    return state


def _load_error(failure: Exception, checkpoint: Path) -> Exception:
    """Turn a failed load into a one-line error, unless the cause is a bug of ours."""
    if isinstance(failure, dist_checkpointing.core.CheckpointingException):
        return UserError(f"{checkpoint} cannot be loaded: {str(failure).splitlines()[0]}")
    causes: list[BaseException] = [failure]
    if isinstance(failure, CheckpointException):  # the exceptions of several ranks
        causes = [one for one, _ in failure.failures.values()]
    if not all(isinstance(one, OSError | EOFError | pickle.UnpicklingError) for one in causes):
        return failure
    return DamagedError(
        f"{checkpoint} is damaged ({type(causes[0]).__name__} in its tensor files); copy it again, or delete that "
        "folder to use the step before it"
    )


def _model_state(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """One sharded state per part of the model; the tensors' keys do not depend on the number of parts."""
    return {str(index): dict(unwrap(chunk).sharded_state_dict()) for index, chunk in enumerate(chunks)}


def _set_model_state(chunks: list[torch.nn.Module], state: dict[str, Any], adapters: bool = True) -> None:
    # Not strict: Megatron-Core's modules list empty `_extra_state` entries that only Transformer Engine fills.
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(state[str(index)], strict=False)
        wrong = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
        if not adapters:
            wrong = [name for name in wrong if not is_adapter(name)]
        if wrong:
            raise RuntimeError(f"checkpoint and model disagree on {wrong[:3]}")


def _random_state() -> ShardedObject:
    """This rank's generators as one object; ranks do not share it."""
    return ShardedObject("random", random_states(), (dist.get_world_size(),), (dist.get_rank(),))
