"""What a run needs of its GPUs before it touches one: settings of the environment, and a GPU for every process.

The settings are read once by each process: the allocator's when it first allocates, the driver's when the process
opens its context. So the command line sets them before torch is imported, however a process was started (`--nproc`,
torchrun, srun, by hand), and what the user has set already stays as it is:

    PYTORCH_ALLOC_CONF=expandable_segments:True   tensors of a million tokens leave holes that nothing else fits into;
                                                  segments that grow give them back
    CUDA_DEVICE_MAX_CONNECTIONS=1                 one hardware queue keeps kernels in the order they were launched in,
                                                  so that tensor-parallel communication starts before the matrix
                                                  product that should hide it

Every command begins with them, so nothing is imported for them: torch only where GPUs are counted or used.
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
# The first torch that does what the allocator's new name says: 2.9 reads it and leaves segments as they were
# (pytorch issue 183387). Older ones know the old name, and 2.8 to 2.10 call it deprecated.
_RENAMED = (2, 11)


def missing_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings above that `environment` does not have under any of their names, for the torch that is installed."""
    missing = {} if CONNECTIONS in environment else {CONNECTIONS: "1"}
    if ALLOCATOR not in environment and OLD_ALLOCATOR not in environment:
        missing[_allocator_name()] = "expandable_segments:True"
    return missing


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the settings that are missing; processes that are started from here have them too."""
    environment.update(missing_settings(environment))


def _allocator_name() -> str:
    numbers = tuple(int(part) for part in re.findall(r"\d+", _torch_version())[:2])
    return OLD_ALLOCATOR if numbers < _RENAMED else ALLOCATOR


def _torch_version() -> str:
    """As its package says, without importing it: "2.11.0+cu130"; empty where that cannot be told."""
    try:
        package = importlib.util.find_spec("torch")
        text = Path(str(package and package.origin)).with_name("version.py").read_text()
    except (OSError, ValueError):
        return ""
    found = re.search(r"__version__ = '(.+?)'", text)
    return found[1] if found else ""


def use(device: torch.device) -> None:
    """Make `device` this thread's GPU; nothing for a CPU.

    Every thread begins on GPU 0. One that touches a tensor of another GPU before this opens a second context there, of
    half a gigabyte for each process of the node.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


def count() -> int:
    """GPUs that torch can use here; a build for CPUs is not imported to say none."""
    if _torch_version().endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def refuse_more_processes(started: int | None = None) -> None:
    """Refuse more processes on this node than torch sees GPUs; where it sees none, they compute on the CPU.

    Args:
        started: processes that are to be started here; None: this one and those that a launcher started beside it.

    Raises:
        UserError: there are more. Told once on each node, where it is known which processes are there.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE")
    processes = started or int(told or int(os.environ.get("LOCAL_RANK", 0)) + 1)
    found = count()
    if not 0 < found < processes:
        return
    from megalong.runtime.network import node_name

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    raise UserError(
        f"{processes} processes on {node_name()}, where torch sees {found} GPU{'s' if found > 1 else ''}{seen}, and "
        f"each needs its own; start at most {found} on a node, or set CUDA_VISIBLE_DEVICES= to compute on the CPU",
        # Without their number, those that have a GPU know of no mistake.
        speaker="node" if started or told else "rank",
    )
