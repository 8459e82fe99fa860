"""Which classes and functions of a package our sources call, where, and with what."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.signatures.source import Source

ROOT = Path(__file__).parents[2]
OURS = ("megalong", "tools", "tests/gpu")
# Called through what stand-ins make, which no text of a call says.
MORE = {
    "transformer_engine": [
        "transformer_engine.pytorch.DotProductAttention.forward",
        "transformer_engine.pytorch.Linear.forward",
    ]
}


@dataclass(frozen=True)
class Call:
    """One call of `name` (`megatron.core.parallel_state.destroy_model_parallel`) at `where` (`file:line`)."""

    name: str
    where: str
    node: ast.Call

    def fault(self, signature: inspect.Signature) -> str | None:
        """Why this call would raise TypeError, as far as its text tells; None where it would not."""
        arguments = [one for one in self.node.args if not isinstance(one, ast.Starred)]
        options = {one.arg: None for one in self.node.keywords if one.arg is not None}
        whole = len(arguments) + len(options) == len(self.node.args) + len(self.node.keywords)
        try:
            # After *arguments nobody knows at which place the next one lies.
            (signature.bind if whole else signature.bind_partial)(*(arguments if whole else ()), **options)
        except TypeError as error:
            return f"{self.where}: {self.name}: {error}"
        return None


def calls(package: str) -> list[Call]:
    """All calls in our sources of what is imported from `package`."""
    files = [file for folder in OURS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [call for file in files for call in calls_in(file.read_text(), str(file.relative_to(ROOT)), package)]


def calls_in(text: str, where: str, package: str) -> Iterator[Call]:
    """Those in the source text of one file."""
    tree = ast.parse(text)
    names, modules = _imported(tree, package)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            first, *rest = ast.unparse(node.func).split(".")
            if first in names and (rest or first not in modules):
                yield Call(".".join([names[first], *rest]), f"{where}:{node.lineno}", node)


def _imported(tree: ast.Module, package: str) -> tuple[dict[str, str], set[str]]:
    """Dotted names of the package by the names they have in a file, and which of these are `import_module`'s."""
    found: dict[str, str] = {}
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            made = node.value
            if ast.unparse(made.func) == "importlib.import_module" and isinstance(made.args[0], ast.Constant):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                module = str(made.args[0].value)
                if module.split(".")[0] == package:
                    found[ast.unparse(target)] = module
                    modules.add(ast.unparse(target))
    return found, modules


def called(package: str) -> list[str]:
    """All names that are called of a package."""
    return sorted({call.name for call in calls(package)} | set(MORE.get(package, ())))


def read(root: Path, package: str) -> dict[str, str]:
    """The signatures of what is called, from these sources; what is not there is left out."""
    source = Source(root)
    found = {name: source.signature(name) for name in called(package)}
    return {name: text for name, text in found.items() if text is not None}
