"""What is installed here: one line per package, and never an error.

Versions are read from package metadata, without imports: this takes milliseconds and works for broken packages. torch
itself is imported only if its build supports GPUs (a CPU build says so in its version).

The package apex on PyPI is a web toolkit; NVIDIA's is built from source and has a `multi_tensor_apply` folder.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from urllib.parse import unquote

import megalong
from megalong.runtime.checkout import checkout, root

PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron-core",
    "transformer-engine": "transformer-engine",
    "apex": "apex",
    "DALI": "nvidia-dali-cuda130",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
}
OPTIONAL = {
    "transformer-engine": "pip install megalong[gpu]",
    "apex": "built from NVIDIA's source, never from PyPI",
    "DALI": "pip install megalong[dali]",
}


def report() -> list[tuple[str, str]]:
    """Pairs of a name and its state; never raises for missing or broken packages."""
    rows = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")
    ]
    rows.append(("  megalong", _megalong()))
    rows += [(name, _package(name)) for name in PACKAGES]
    devices = gpus()
    rows.append(("GPU", ", ".join(devices) if devices else "none that torch can use"))
    return rows


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _megalong() -> str:
    """The running megalong, and another one installed here, which commands started elsewhere would run."""
    where = f"checkout {root()}" if checkout() is not None else f"installed in {root()}"
    other = _installed_elsewhere()
    return f"{megalong.__version__}, {where}" + (f" (this environment has {other} installed)" if other else "")


def _installed_elsewhere() -> Path | None:
    """The folder of an installed megalong other than the running one."""
    places = [place for place in sys.path if place and Path(place).resolve() != root()]
    found = next(iter(importlib.metadata.distributions(name="megalong", path=places)), None)
    if found is None:
        return None
    try:
        url = json.loads(found.read_text("direct_url.json") or "{}").get("url", "")
    except ValueError:
        return None
    folder = Path(unquote(url.removeprefix("file://")) if url.startswith("file://") else str(found.locate_file("")))
    return None if folder.resolve() == root() else folder


def _package(name: str) -> str:
    if name == "apex":
        return _apex()
    version = _version(PACKAGES[name])
    if version is not None:
        return version
    return f"not installed; optional ({OPTIONAL[name]})" if name in OPTIONAL else f"missing: pip install {name}"


def _apex() -> str:
    version = _version("apex")
    if is_nvidia_apex():
        return f"{version or 'present'}, NVIDIA's"
    if version is not None or _folders("apex"):
        return f"{version or 'present'}, but this is PyPI's web toolkit, not NVIDIA's: pip uninstall apex"
    return f"not installed; optional ({OPTIONAL['apex']})"


def is_nvidia_apex() -> bool:
    """Whether an importable `apex` is NVIDIA's."""
    return any((folder / "multi_tensor_apply").is_dir() for folder in _folders("apex"))


def _folders(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def gpus() -> list[str]:
    """Names of the GPUs that torch can use."""
    if (_version("torch") or "+cpu").endswith("+cpu"):
        return []
    try:
        import torch

        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    except Exception:  # a broken driver or build is not this command's failure
        return []
