"""Which slow tests a run of `.ci/run` takes: those that the change may touch, and a third of the others in turn.

All of them take as long as everything else together. A change to the writer of datasets rarely breaks what happens to a
job at its time limit, and three changes later that is tested again. `bash tests/full.sh` takes all.

A change may touch a file of tests if it touches that file, a module that the file imports (itself, or through the
tests' own helpers), or anything in the package of the same name: `tests/data` and `megalong/data`.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.imports import imported

ROOT = Path(__file__).parents[1]
THIRDS = 3
SINCE = "MEGALONG_CHANGED_SINCE"  # the commit that the change starts from; else HEAD's last HOURS are the change
HOURS = 6


@dataclass(frozen=True)
class Change:
    """What lies between two commits.

    Attributes:
        since: the commit before the change.
        files: paths of changed files, relative to the repository.
        turn: which third of the untouched files' turn it is: the number of commits, modulo three.
    """

    since: str
    files: frozenset[str]
    turn: int


def current_change() -> Change | None:
    """The change that HEAD ends, with what is not committed yet.

    None where git cannot say: there is no repository, or one without its history.
    """
    try:
        before = int(_git("log", "-1", "--format=%ct")) - HOURS * 3600
        since = os.environ.get(SINCE) or _git("rev-list", "-1", f"--before={before}", "HEAD")
        if not since:
            return None
        files = _git("diff", "--name-only", since).splitlines()
        return Change(
            _git("rev-parse", "--short", since), frozenset(files), int(_git("rev-list", "--count", "HEAD")) % THIRDS
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def slow_files() -> list[Path]:
    """Files with slow tests."""
    return sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.slow" in path.read_text("utf-8"))


def taken(files: Sequence[Path], change: Change) -> dict[Path, str]:
    """The files of tests to run, each with why: `touched` or `in turn`."""
    reasons = {file: "touched" for file in files if subjects(file) & _names(change.files)}
    others = sorted(file for file in files if file not in reasons)
    return reasons | dict.fromkeys(others[change.turn :: THIRDS], "in turn")


def subjects(file: Path) -> set[str]:
    """Dotted names of what a file of tests is about: modules, and the package of its folder with a final dot."""
    reached, waiting = set[str](), [_dotted(file.relative_to(ROOT))]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        source = ROOT / (name.replace(".", "/") + ".py")
        if name.startswith("tests.") and source.is_file():
            waiting += _imported(source)
    package = ".".join(("megalong", *file.relative_to(ROOT / "tests").parent.parts))
    return reached | {f"{package}."}


@functools.cache
def _imported(source: Path) -> frozenset[str]:
    """What a file of tests imports, and what it names for worker processes to import: `"tests.a.workers:train"`."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    workers = {text.partition(":")[0] for text in strings if text.startswith("tests.")}
    names = imported(tree)
    return frozenset(names | {name.rpartition(".")[0] for name in names} | workers)


def _names(files: Iterable[str]) -> set[str]:
    """Dotted names of changed files, and of the packages they lie in with a final dot."""
    names = {_dotted(Path(file)) for file in files if file.endswith(".py")}
    return names | {name.rpartition(".")[0] + "." for name in names}


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)
