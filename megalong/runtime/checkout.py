"""Which megalong is running: an installed one, or one of perhaps several checkouts.

`python -m megalong` prefers the package in the current folder to the installed one; a console script does the opposite.
If there are two checkouts, a process must pass its own on to its children.
"""

from __future__ import annotations

import os
from pathlib import Path

import megalong


def root() -> Path:
    """The folder that contains the running package."""
    return Path(megalong.__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The checkout that contains the running package, None if it is installed elsewhere."""
    return root() if (root() / "slurm" / "common.sh").is_file() else None


def same_code() -> dict[str, str]:
    """Environment variables under which a child imports the megalong of this process, wherever it is started."""
    found = {"PYTHONSAFEPATH": "1"}
    if checkout() is not None:
        found["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(root())])
    return found
