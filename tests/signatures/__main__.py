"""Record anew what our sources call of packages: `python -m tests.signatures PACKAGE VERSION WHEEL_OR_FOLDER …`.

    python -m tests.signatures transformer_engine 2.20.2 transformer_engine-2.20.2-py3-none-any.whl \\
        megatron 0.16.1 .venv/lib/python3.11/site-packages megatron 0.19.2 megatron_core-0.19.2-….whl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.signatures import FILE, recorded
from tests.signatures.calls import read


def main(words: list[str]) -> None:
    """Record `PACKAGE VERSION ROOT` for each three words."""
    kept = dict(recorded()) if FILE.exists() else {}
    for package, version, root in zip(words[::3], words[1::3], words[2::3], strict=True):
        kept[f"{package} {version}"] = read(Path(root), package)
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
