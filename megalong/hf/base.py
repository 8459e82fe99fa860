"""What an adapter's base is called, so that `peft` finds it again.

A checkpoint with adapters remembers the folder its frozen weights came from (`Meta.base`), with its whole path: a
relative one, such as `checkpoints/llama`, would be looked for on the hub wherever the folder is not. A folder of the
hub's own cache is called what it is on the hub:

    ~/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/d04e592b   →   meta-llama/Llama-3.1-8B, d04e592b
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")


def whole_path(folder: str | Path) -> str:
    """The folder's path from the root, its links kept."""
    return os.path.abspath(folder)


def named(base: str) -> tuple[str, str | None]:
    """(name, revision) of a base for `adapter_config.json`: the hub's for its cache, else the path and None."""
    found = _SNAPSHOT.search(base) or _SNAPSHOT.search(os.path.realpath(base))
    return (base, None) if found is None else (found["name"].replace("--", "/"), found["revision"])
