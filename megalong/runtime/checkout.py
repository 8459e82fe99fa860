"""Which megalong is running: an installed one, or one of perhaps several checkouts.

`python -m megalong` imports what lies in the folder it is started in before what is installed, and a console script
the other way round. Where two checkouts meet, a process must hand its own on to its children.
"""

from __future__ import annotations

import os
from pathlib import Path

import megalong


def root() -> Path:
    """The folder that the running package lies in."""
    return Path(megalong.__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The checkout that the running package lies in, None where it is installed apart from one."""
    return root() if (root() / "slurm" / "common.sh").is_file() else None


def same_code() -> dict[str, str]:
    """Environment variables under which a child imports the megalong of this process, wherever it is started."""
    found = {"PYTHONSAFEPATH": "1"}
    if checkout() is not None:
        found["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(root())])
    return found
