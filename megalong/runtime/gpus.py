"""What a run needs before it uses a GPU: environment variables, and one GPU for every process.

Each process reads these variables once: the allocator's when it first allocates, the driver's when the process opens
its context. So the command line sets them before torch is imported, however the process was started (`--nproc`,
torchrun, srun, by hand). Variables that the user has set are left alone:

    PYTORCH_ALLOC_CONF=expandable_segments:True   tensors of a million tokens leave holes that nothing else fits into;
                                                  growing segments return them
    CUDA_DEVICE_MAX_CONNECTIONS=1                 one hardware queue runs kernels in launch order, so that
                                                  tensor-parallel communication starts before the matrix product
                                                  that should hide it

Every command sets them first, so this module imports torch only to count or use GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from megalong.errors import UserError

if TYPE_CHECKING:
    import torch

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
ALLOCATOR, OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
# The first torch in which the allocator's new name works: 2.9 reads it without an effect (pytorch issue 183387). Older
# versions need the old name, which 2.8 to 2.10 call deprecated.
_RENAMED = (2, 11)


def missing_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables above that `environment` has under none of their names, for the installed torch."""
    missing = {} if CONNECTIONS in environment else {CONNECTIONS: "1"}
    if ALLOCATOR not in environment and OLD_ALLOCATOR not in environment:
        missing[_allocator_name()] = "expandable_segments:True"
    return missing


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the missing variables; child processes inherit them."""
    environment.update(missing_settings(environment))


def _allocator_name() -> str:
    numbers = tuple(int(part) for part in re.findall(r"\d+", _torch_version())[:2])
    return OLD_ALLOCATOR if numbers < _RENAMED else ALLOCATOR


def _torch_version() -> str:
    """The version from torch's package, without importing it: "2.11.0+cu130"; empty if unknown."""
    try:
        package = importlib.util.find_spec("torch")
        text = Path(str(package and package.origin)).with_name("version.py").read_text()
    except (OSError, ValueError):
        return ""
    found = re.search(r"__version__ = '(.+?)'", text)
    return found[1] if found else ""


def use(device: torch.device) -> None:
    """Make `device` this thread's GPU; does nothing for a CPU.

    Every thread starts on GPU 0. If it uses a tensor of another GPU before this call, it opens a second context on GPU
    0, of half a gigabyte for each process of the node.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


def count() -> int:
    """Number of GPUs that torch can use here; a CPU build of torch is not imported for this."""
    if _torch_version().endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def refuse_more_processes(started: int | None = None) -> None:
    """Refuse more processes on this node than torch sees GPUs; without GPUs, they compute on the CPU.

    Args:
        started: processes to be started here; None: this one and those that a launcher started beside it.

    Raises:
        UserError: there are more processes. Printed once per node if the number of local processes is known.
    """
    local_world = os.environ.get("LOCAL_WORLD_SIZE")
    processes = started or int(local_world or int(os.environ.get("LOCAL_RANK", 0)) + 1)
    found = count()
    if not 0 < found < processes:
        return
    from megalong.runtime.network import node_name

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    raise UserError(
        f"{processes} processes on {node_name()}, where torch sees {found} GPU{'s' if found > 1 else ''}{seen}, and "
        f"each needs its own; start at most {found} on a node, or set CUDA_VISIBLE_DEVICES= to compute on the CPU",
        # Without the number of local processes, those with a GPU see no mistake.
        speaker="node" if started or local_world else "rank",
    )
