"""The vocabulary size and the tokenizer's folder of a configuration's model, read without torch.

For reports that need no model (`megalong data plan`, `data inspect`). Training reads and checks the whole architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalong.config.schema import Config
from megalong.config.sections import Load


def model_vocabulary(config: Config) -> int | None:
    """Vocabulary size of the model that `config` starts from; None if its files are missing or do not give it."""
    load = config.model.load
    if load is None:
        return config.model.architecture.vocab_size if config.model.architecture is not None else None
    if load.hf is not None:
        return _number(_json(Path(load.hf) / "config.json").get("vocab_size"))
    architecture = _json(_step(load) / "megalong.json").get("architecture")
    return _number(architecture.get("vocab_size")) if isinstance(architecture, dict) else None


def model_tokenizer(config: Config) -> Path | None:
    """Folder of the tokenizer of the model that `config` starts from; None if none is named or it does not exist."""
    load = config.model.load
    if load is None:
        return None
    folder = Path(load.hf) if load.hf is not None else _step(load) / "tokenizer"
    return folder if folder.is_dir() else None


def _step(load: Load) -> Path:
    """The newest step of the run that `load.checkpoint` names, or that folder itself."""
    folder = Path(load.checkpoint or "")
    return max(folder.glob("checkpoints/step-*[0-9]"), default=folder)


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
