"""What a source file imports, read from its text."""

from __future__ import annotations

import ast


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a file imports, anywhere in it; `a.b` of `from a import b` may be a module or a name in one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names
