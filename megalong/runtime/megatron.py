"""What differs between Megatron-Core's versions and installations, in one place.

`prepare()` must run before anything imports `megatron.core`: it hides a broken Transformer Engine, installs the CPU
adapter where there is no GPU, and puts our AdamW where neither Transformer Engine's nor apex's is to be had.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
import warnings
from typing import Any

import torch

log = logging.getLogger("megalong")

_TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine_torch")
# Messages that ask nothing of a user of megalong, by logger and first words: 0.19's advice to those who write models
# (what it advises against works as before), and torch built for CUDA on a machine without.
_NOISE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def prepare(device: torch.device) -> None:
    """Make `import megatron.core` safe and usable on `device`; idempotent."""
    hide_broken_transformer_engine()
    _quiet()
    if device.type == "cpu":
        from megalong.runtime import cpu

        cpu.install()
    _install_adam()


def _quiet() -> None:
    """Hide warnings that a user of megalong can do nothing about; our own go through the log."""
    # "Apex is not installed. Falling back to ...": we choose those parts ourselves.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # torch renames what Megatron-Core still calls by its old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch\.distributed)\.")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE[record.name])


def hide_broken_transformer_engine() -> None:
    """Transformer Engine that cannot be imported is treated as absent.

    `pip install transformer-engine` without its CUDA core raises RuntimeError at import, which Megatron-Core, expecting
    ImportError, does not survive. `sys.modules[name] = None` turns it into the ImportError it expects.
    """
    if sys.modules.get("transformer_engine", "unset") is None or not importlib.util.find_spec("transformer_engine"):
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        for name in _TRANSFORMER_ENGINE:
            sys.modules[name] = None  # type: ignore[assignment]
        log.warning("transformer-engine is installed but cannot be imported (%s): going on without it", error)


def _install_adam() -> None:
    """Give Megatron-Core's optimizers `GroupStepAdamW` where they found neither Transformer Engine nor apex."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    from megalong.runtime.adam import GroupStepAdamW

    patched: tuple[Any, Any] = (optimizer, distrib_optimizer)
    for module in patched:
        module.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # The flag means "`step` lives in the parameter group", which is what our class does.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def version() -> str:
    """The installed Megatron-Core's version."""
    from megatron.core import __version__

    return str(__version__)


def checkpoint_strategy_arguments(strategy: type) -> tuple[Any, ...]:
    """What a save strategy's constructor must be told: 0.16 asks for the format's name and version, 0.19 does not."""
    return ("torch_dist", 1) if "backend" in inspect.signature(strategy).parameters else ()


def mark_as_slice(weight: torch.Tensor, dim: int) -> None:
    """Say that `weight` is cut along `dim` over tensor-parallel ranks.

    0.19 has said so when it allocated the weight; 0.16 says it only of weights it fills itself.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not hasattr(weight, "partition_dim"):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
