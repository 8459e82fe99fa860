"""The model that a configuration starts from, if its files are on this machine: for reports and checks before a run.

Reads config.json, or the megalong.json of a run's newest step; needs no torch and opens no weights. Whether a
checkpoint is complete is checked when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megalong.config.architecture import Architecture
from megalong.config.positions import check_positions, trained_architecture
from megalong.config.schema import Config
from megalong.hf.config import CONFIG_FILE, read_architecture


def known_architecture(config: Config) -> Architecture | None:
    """The model before `model.rope`; None if its files are not here (yet) or cannot be read.

    Raises:
        UserError: config.json describes a model that cannot be trained.
    """
    load = config.model.load
    if load is None:
        return config.model.architecture
    if load.hf is not None:
        return read_architecture(load.hf) if (Path(load.hf) / CONFIG_FILE).is_file() else None
    folder = Path(load.checkpoint or "")
    return _saved(folder) or _read(folder / "megalong.json")


def check_stages(stages: Sequence[Config]) -> None:
    """Run `check_positions` for every stage that has not begun and whose model is known.

    A stage that starts from an earlier stage has that stage's model, whether it has been trained or not.

    Raises:
        UserError: samples of a stage use positions that its RoPE does not cover, or `model.rope` contradicts its model.
    """
    trained: dict[str, Architecture] = {}
    for config in stages:
        load, own = config.model.load, _saved(Path(config.run.dir))
        if own is not None:
            trained[config.run.dir] = own
            continue
        earlier = trained.get(load.checkpoint or "") if load is not None else None
        architecture = earlier or known_architecture(config)
        if architecture is not None:
            check_positions(config, architecture)
            trained[config.run.dir] = trained_architecture(config, architecture)


def _saved(run: Path) -> Architecture | None:
    """The model of a run's newest step."""
    steps = sorted(run.glob("checkpoints/step-*[0-9]/megalong.json"))
    return _read(steps[-1]) if steps else None


def _read(path: Path) -> Architecture | None:
    try:
        return Architecture.model_validate(json.loads(path.read_bytes())["architecture"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
