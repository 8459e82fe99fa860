"""The name of an adapter's base model, so that `peft` can find it.

A checkpoint with adapters stores the absolute path of the folder that its frozen weights came from (`Meta.base`). A
relative path, such as `checkpoints/llama`, would be taken for a name on the hub if the folder is not there. A folder in
the hub's cache gets its name on the hub:

    ~/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/d04e592b   →   meta-llama/Llama-3.1-8B, d04e592b
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")


def absolute_path(folder: str | Path) -> str:
    """The folder's absolute path; symbolic links are kept."""
    return os.path.abspath(folder)


def hub_name(base: str) -> tuple[str, str | None]:
    """(name, revision) of a base for `adapter_config.json`: the hub's for a folder of its cache, else path and None."""
    found = _SNAPSHOT.search(base) or _SNAPSHOT.search(os.path.realpath(base))
    return (base, None) if found is None else (found["name"].replace("--", "/"), found["revision"])
