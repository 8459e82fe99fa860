"""The order of the packages: each imports only what lies below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.imports import imported

ROOT = Path(__file__).parents[1]

# From the ground up; those on one line do not import each other.
FLOORS = (
    ("errors", "__init__"),
    ("runtime",),
    ("config", "plots"),
    ("rope", "data", "costs"),
    ("sft", "attention"),
    ("batches",),
    ("model",),
    ("checkpoint",),
    ("hf",),
    ("evaluation",),
    ("training",),
    ("cluster", "slurm", "planning"),
    ("quickstart",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# Packages that only some of ours may import, since they are large, optional or differ between versions.
ONLY = {
    "megatron": {"runtime", "model", "checkpoint", "training"},
    "transformer_engine": {"attention", "model", "runtime"},
    "apex": {"runtime"},
    "nvidia": {"batches"},
}


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in (ROOT / "megalong").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = _modules()


def _module(name: str) -> str | None:
    """The module of ours that an imported name lies in."""
    for candidate in (name, name.rpartition(".")[0]):
        for module in (candidate, f"{candidate}.__init__"):
            if module in MODULES:
                return module
    return None


def _room(module: str) -> str:
    return module.split(".")[1]


EDGES = {name: {found for one in imported(tree) if (found := _module(one))} - {name} for name, tree in MODULES.items()}


def test_nothing_imports_upward():
    height = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    assert {_room(module) for module in MODULES} == set(height)
    upward = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in others
        if _room(module) != _room(other) and height[_room(other)] >= height[_room(module)]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    """Also not inside functions, or for types alone."""
    waiting = dict(EDGES)
    while free := [module for module, others in waiting.items() if not others & set(waiting)]:
        for module in free:
            del waiting[module]
    assert not waiting


def test_heavy_packages_are_imported_in_few_places():
    for module, tree in MODULES.items():
        for name in imported(tree):
            assert _room(module) in ONLY.get(name.partition(".")[0], {_room(module)}), (module, name)


def test_a_module_has_one_subject():
    """At most 400 lines, half of them below 150."""
    lines = sorted(len((ROOT / (name.replace(".", "/") + ".py")).read_text().splitlines()) for name in MODULES)
    assert lines[-1] <= 400
    assert lines[len(lines) // 2] < 150
