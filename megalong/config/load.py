"""Build checked configurations from a file and the command line.

Values come in layers, and a later layer overrides an earlier one key by key: defaults, the file's sections, the stage's
sections, the command line's `section.key=value`. Lists and `model.load` are replaced as a whole.

    run: {name: extend, dir: runs/extend}        stage 1 runs as extend-short in runs/extend/01-short,
    model: {load: {hf: llama}}                   stage 2 as extend-long in runs/extend/02-long,
    stages:                                      starting from the weights of stage 1, because it names no
      - {name: short, data: {seq_length: 8192}}  model.load of its own
      - {name: long, data: {seq_length: 65536}}
"""

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalong.config.explain import explain
from megalong.config.schema import Config
from megalong.config.text import parse_yaml, read_yaml
from megalong.errors import UserError

COMMAND_LINE = "command line"
Tree = dict[str, Any]


def load_config(path: str | Path, overrides: list[str] | None = None) -> list[Config]:
    """The stages of a run, in order; a file without `stages:` is one stage.

    `overrides` are `section.key=value` with YAML values and apply to every stage. Raises `UserError` (one line: where,
    key, value, what is allowed) for any mistake in the file or the overrides.
    """
    base, pairs = read_yaml(path), [_parse_override(text) for text in overrides or []]
    stages = base.pop("stages", None)
    if stages is None:
        return [_validate(_apply(base, pairs), str(path), pairs)]
    configs: list[Config] = []
    for number, stage in enumerate(_check_stages(stages, path), start=1):
        source = f"{path}, stage {stage['name']}"
        tree = _apply(_merge(base, {key: value for key, value in stage.items() if key != "name"}), pairs)
        _name_stage(tree, number, stage["name"])
        if configs and not _sets_load(stage, pairs):
            model = tree["model"] if isinstance(tree.get("model"), dict) else {}
            tree["model"] = {**model, "load": {"checkpoint": configs[-1].run.dir}, "architecture": None}
        configs.append(_validate(tree, source, pairs))
    return configs


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise UserError(f"{COMMAND_LINE}: {text}: not understood; write section.key=value, such as optimizer.lr=3e-5")
    if key.split(".")[0] == "stages":
        raise UserError(f"{COMMAND_LINE}: {key}: stages are set in the file; write section.key=value for all of them")
    return key, parse_yaml(value, f"{COMMAND_LINE}: {key}")


def _apply(tree: Tree, pairs: list[tuple[str, Any]]) -> Tree:
    for key, value in pairs:
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        tree = _merge(tree, nested)
    return tree


def _merge(lower: Tree, upper: Tree, prefix: str = "") -> Tree:
    """`upper` over `lower`, section by section, in a new tree."""
    merged = dict(lower)
    for name, value in upper.items():
        below, key = merged.get(name), prefix + name
        if isinstance(below, dict) and isinstance(value, dict) and key != "model.load":
            value = _merge(below, value, f"{key}.")
        merged[name] = value
    return merged


def _check_stages(stages: Any, path: str | Path) -> list[Tree]:
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path}: stages: must be a list of stages, each with a name and the sections it changes")
    seen: set[str] = set()
    for number, stage in enumerate(stages, start=1):
        where = f"{path}: stages[{number - 1}]"
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"{where}: needs a name of letters, digits, '.', '_' and '-', such as `name: extend`")
        if name in seen:
            raise UserError(f"{where}: the name {name} is taken by an earlier stage; give every stage its own")
        run = stage.get("run")
        taken = [key for key in ("name", "dir") if isinstance(run, dict) and key in run]
        if taken:
            raise UserError(
                f"{where}: run.{taken[0]}: follows from the stage's name; set it in the top-level run section"
            )
        seen.add(name)
    return stages


def _name_stage(tree: Tree, number: int, name: str) -> None:
    run = tree.get("run")
    if isinstance(run, dict) and isinstance(run.get("dir"), str) and isinstance(run.get("name"), str):
        folder = str(Path(run["dir"]) / f"{number:02d}-{name}") if run["dir"] else ""
        tree["run"] = {**run, "name": f"{run['name']}-{name}", "dir": folder}


def _sets_load(stage: Tree, pairs: list[tuple[str, Any]]) -> bool:
    """Whether a stage defines its own start: a `model.load`, or an architecture for random weights."""
    model = stage.get("model")
    return isinstance(model, dict) and (model.get("load") is not None or model.get("architecture") is not None)


def _validate(tree: Tree, source: str, pairs: list[tuple[str, Any]]) -> Config:
    def where(key: str) -> str:
        if any(key == name or key.startswith((f"{name}.", f"{name}[")) for name, _ in pairs):
            return COMMAND_LINE
        mixed = any(not key or name.startswith(f"{key}.") for name, _ in pairs)
        return f"{source} + {COMMAND_LINE}" if mixed else source

    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Config, where) from None
