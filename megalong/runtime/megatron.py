"""What differs between Megatron-Core's versions and installations, in one place.

`prepare()` must run before anything imports `megatron.core`: it hides a broken Transformer Engine, hides a working one
and installs the CPU adapter where there is no GPU, and puts our AdamW where neither Transformer Engine's nor apex's is
to be had.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalong.errors import UserError

if TYPE_CHECKING:
    import torch

from megalong.runtime import cpu

log = logging.getLogger("megalong")

_TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
# apex, and those of its extensions that Megatron-Core imports by themselves.
_APEX = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")
# The line that gave checkpoints their present form.
_COMMON_IN_SHARDS = (0, 19)
# Messages that ask nothing of a user of megalong, by logger and first words: 0.19's advice to those who write models
# (what it advises against works as before), and torch built for CUDA on a machine without.
_NOISE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def prepare(device: torch.device) -> None:
    """Make `import megatron.core` safe and usable on `device`; idempotent."""
    _quiet()
    if device.type == "cpu":
        hide_gpu_packages()
        cpu.install()
    else:
        hide_broken_transformer_engine()
    _install_adam()


def _quiet() -> None:
    """Hide warnings that a user of megalong can do nothing about; our own go through the log."""
    # "Apex is not installed. Falling back to ...": we choose those parts ourselves.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # torch renames what Megatron-Core still calls by its old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch\.distributed)\.")
    # How 0.19 reads, in each process by itself, what lies beside the tensors of a checkpoint.
    reading = r"torch\.distributed is disabled, unavailable|The argument order of load has been changed"
    warnings.filterwarnings("ignore", message=reading, module=r"torch\.distributed\.checkpoint\.")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE[record.name])


def hide_gpu_packages(why: str = "no GPU in use") -> None:
    """Treat Transformer Engine and apex as absent: Megatron-Core would give their kernels the CPU's tensors."""
    hidden = _hide(*_TRANSFORMER_ENGINE, *_APEX)
    if hidden:
        log.info("%s: ignoring %s, which needs a GPU", why, ", ".join(hidden))


def _hide(*packages: str) -> list[str]:
    """Make importing these raise ImportError, as if they were not installed; those that are."""
    found = [name for name in packages if sys.modules.get(name) or importlib.util.find_spec(name)]
    for name in [*found, *(loaded for loaded in sys.modules if loaded.partition(".")[0] in found)]:
        sys.modules[name] = None  # type: ignore[assignment]
    return found


def hide_broken_transformer_engine() -> None:
    """Transformer Engine that cannot be imported is treated as absent.

    `pip install transformer-engine` without its CUDA core raises RuntimeError at import, which Megatron-Core, expecting
    ImportError, does not survive.
    """
    if sys.modules.get("transformer_engine", "unset") is None or not importlib.util.find_spec("transformer_engine"):
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        _hide(*_TRANSFORMER_ENGINE)
        log.warning("transformer-engine is installed but cannot be imported (%s): running without it", error)


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
    """The version that `import megatron.core` would give, told without importing it: "0.19.2".

    Not `__version__`, to which 0.19 appends the commit of whatever git checkout it is installed inside.
    """
    package = importlib.util.find_spec("megatron.core")
    assert package is not None
    assert package.origin is not None
    return str(runpy.run_path(str(Path(package.origin).with_name("package_info.py")))["__shortversion__"])


def check_readable(checkpoint: Path, written_by: str) -> None:
    """Refuse a checkpoint whose format came after the installed version.

    0.19 puts what is no tensor into the shards. Earlier versions look for it in `common.pt`, which 0.19 reads as well
    but does not write.

    Args:
        written_by: the Megatron-Core version that wrote it, as `megalong.json` says.

    Raises:
        UserError: the installed version cannot read it.
    """
    here = version()
    if _line(here) < _COMMON_IN_SHARDS <= _line(written_by):
        raise UserError(
            f"{checkpoint} was written under Megatron-Core {written_by}, and the installed {here} cannot read that; "
            "use 0.19 or later (Python 3.12), or export it there with `megalong checkpoint export` and load the result"
        )


def _line(version: str) -> tuple[int, ...]:
    """0.19.2 → (0, 19)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


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
