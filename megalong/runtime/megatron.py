"""Differences between Megatron-Core's versions and installations, in one place.

`prepare()` must run before anything imports `megatron.core`. It hides a broken Transformer Engine. Without a GPU it
also hides a working one, and installs the CPU adapter. If neither Transformer Engine's nor apex's Adam is available, it
installs our AdamW.
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
# The version that introduced the current checkpoint format.
_COMMON_IN_SHARDS = (0, 19)
# Messages that users of megalong can ignore, by logger and first words: 0.19's advice to authors of models (the
# deprecated parts still work), and torch built for CUDA on a machine without a GPU.
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
    """Hide warnings that a user of megalong can do nothing about; our own warnings go through the log."""
    # "Apex is not installed. Falling back to ...": we choose these parts ourselves.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # torch has renamed functions that Megatron-Core still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch\.distributed)\.")
    # 0.19 reads a checkpoint's non-tensor part in each process separately.
    reading = r"torch\.distributed is disabled, unavailable|The argument order of load has been changed"
    warnings.filterwarnings("ignore", message=reading, module=r"torch\.distributed\.checkpoint\.")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE[record.name])


def hide_gpu_packages(why: str = "no GPU in use") -> None:
    """Treat Transformer Engine and apex as absent: Megatron-Core would pass CPU tensors to their kernels."""
    hidden = _hide(*_TRANSFORMER_ENGINE, *_APEX)
    if hidden:
        log.info("%s: ignoring %s, which needs a GPU", why, ", ".join(hidden))


def _hide(*packages: str) -> list[str]:
    """Make importing these raise ImportError, as if they were not installed; return those that are installed."""
    found = [name for name in packages if sys.modules.get(name) or importlib.util.find_spec(name)]
    for name in [*found, *(loaded for loaded in sys.modules if loaded.partition(".")[0] in found)]:
        sys.modules[name] = None  # type: ignore[assignment]
    return found


def hide_broken_transformer_engine() -> None:
    """Treat a Transformer Engine that cannot be imported as absent.

    `pip install transformer-engine` without its CUDA core raises RuntimeError at import, which Megatron-Core does not
    catch: it expects ImportError.
    """
    if sys.modules.get("transformer_engine", "unset") is None or not importlib.util.find_spec("transformer_engine"):
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        _hide(*_TRANSFORMER_ENGINE)
        log.warning("transformer-engine is installed but cannot be imported (%s): running without it", error)


def _install_adam() -> None:
    """Give Megatron-Core's optimizers `GroupStepAdamW` if they found neither Transformer Engine nor apex."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    from megalong.runtime.adam import GroupStepAdamW

    patched: tuple[Any, Any] = (optimizer, distrib_optimizer)
    for module in patched:
        module.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # The flag means "`step` is in the parameter group", as in our class.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def version() -> str:
    """The version of `megatron.core`, without importing it: "0.19.2".

    Not `__version__`, to which 0.19 appends the commit of any git checkout that surrounds the installation.
    """
    package = importlib.util.find_spec("megatron.core")
    assert package is not None
    assert package.origin is not None
    return str(runpy.run_path(str(Path(package.origin).with_name("package_info.py")))["__shortversion__"])


def check_readable(checkpoint: Path, written_by: str) -> None:
    """Refuse a checkpoint whose format is newer than the installed version.

    0.19 stores non-tensors in the shards. Earlier versions look for them in `common.pt`, which 0.19 can read but does
    not write.

    Args:
        written_by: the Megatron-Core version that wrote it, from `megalong.json`.

    Raises:
        UserError: the installed version cannot read it.
    """
    here = version()
    if _line(here) < _COMMON_IN_SHARDS <= _line(written_by):
        raise UserError(
            f"{checkpoint} was written by Megatron-Core {written_by}, and the installed {here} cannot read that; "
            "use 0.19 or later (Python 3.12), or export it there with `megalong checkpoint export` and load the result"
        )


def _line(version: str) -> tuple[int, ...]:
    """0.19.2 → (0, 19)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def checkpoint_strategy_arguments(strategy: type) -> tuple[Any, ...]:
    """Arguments for a save strategy's constructor: 0.16 takes the format's name and version, 0.19 does not."""
    return ("torch_dist", 1) if "backend" in inspect.signature(strategy).parameters else ()


def mark_as_slice(weight: torch.Tensor, dim: int) -> None:
    """Mark `weight` as split along `dim` over tensor-parallel ranks.

    0.19 marks a weight when it allocates it; 0.16 marks only weights that it initializes itself.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not hasattr(weight, "partition_dim"):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
