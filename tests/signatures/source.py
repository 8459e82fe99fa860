"""Signatures read from a package's sources, a folder or a wheel, without importing them."""

from __future__ import annotations

import ast
import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path

Node = ast.FunctionDef | ast.ClassDef


class Source:
    """The sources of a package.

    Args:
        root: the folder that the package lies in, or a wheel.
    """

    def __init__(self, root: Path) -> None:
        self._root = zipfile.Path(root) if root.suffix == ".whl" else root

    def signature(self, name: str) -> str | None:
        """Of a function, a class or a method by its dotted name, without `self`; None where there is none."""
        found = self._find(name)
        if found is None:
            return None
        node, module, method = found
        if isinstance(node, ast.ClassDef):
            return self._of_class(node, module)
        bound = method and not _is_decorated(node, "staticmethod")
        return _text(node.args, skip=int(bound))

    @functools.cache  # noqa: B019  (one short-lived source a package)
    def _module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            file = self._root / candidate
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def _find(self, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> tuple[Node, str, bool] | None:
        """A definition, the module it is in, and whether it is a method; `seen`: what led here."""
        words = name.split(".")
        for size in range(len(words) - 1, 0, -1):
            module = ".".join(words[:size])
            if self._module(module) is not None:
                return self._within(module, words[size:], seen)
        return None

    def _within(
        self, module: str, words: list[str], seen: frozenset[tuple[str, str]] = frozenset()
    ) -> tuple[Node, str, bool] | None:
        first, *rest = words
        if (module, first) in seen:  # modules that import each other
            return None
        seen |= {(module, first)}
        tree = self._module(module)
        assert tree is not None
        for statement in _statements(tree.body):
            if isinstance(statement, Node) and statement.name == first:
                return self._member(statement, module, rest) if rest else (statement, module, False)
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == first:
                        origin = self._absolute(module, statement)
                        found = self._find(".".join([origin, alias.name, *rest]), seen)
                        if found is not None:
                            return found
        return None

    def _member(self, owner: Node, module: str, words: list[str]) -> tuple[Node, str, bool] | None:
        assert isinstance(owner, ast.ClassDef)
        (name,) = words
        for one in owner.body:
            if isinstance(one, ast.FunctionDef) and one.name == name:
                return one, module, True
        for base in owner.bases:
            found = self._within(module, [*ast.unparse(base).split("."), name]) if _is_dotted(base) else None
            if found is not None:
                return found
        return None

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        is_package = (self._root / module.replace(".", "/") / "__init__.py").is_file()
        words = module.split(".")
        kept = words[: len(words) - statement.level + int(is_package)]
        return ".".join([*kept, *([statement.module] if statement.module else [])])

    def _of_class(self, node: ast.ClassDef, module: str) -> str:
        if _is_dataclass(node):
            return f"({', '.join(self._fields(node, module).values())})"
        made = self._member(node, module, ["__init__"])
        if made is not None:
            return _text(made[0].args, skip=1)  # type: ignore[union-attr]
        return "()"

    def _fields(self, node: ast.ClassDef, module: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for base in node.bases:
            origin = self._within(module, ast.unparse(base).split(".")) if _is_dotted(base) else None
            if origin is not None and isinstance(origin[0], ast.ClassDef) and _is_dataclass(origin[0]):
                found |= self._fields(origin[0], origin[1])
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                value = "" if one.value is None else ast.unparse(one.value)
                if "ClassVar" in ast.unparse(one.annotation) or "init=False" in value:
                    continue
                required = one.value is None or (value.startswith("field(") and "default" not in value)
                found[one.target.id] = one.target.id if required else f"{one.target.id}=..."
        return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, also within `if` and `try`."""
    for one in body:
        yield one
        if isinstance(one, ast.If):
            yield from _statements([*one.body, *one.orelse])
        elif isinstance(one, ast.Try):
            yield from _statements([*one.body, *(inner for handler in one.handlers for inner in handler.body)])


def _text(arguments: ast.arguments, skip: int) -> str:
    """Without annotations and values of defaults."""
    for one in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if one is not None:
            one.annotation = None
    dots = ast.Constant(...)
    cut = ast.arguments(
        posonlyargs=arguments.posonlyargs[skip:],
        args=arguments.args[max(0, skip - len(arguments.posonlyargs)) :],
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=[None if default is None else dots for default in arguments.kw_defaults],
        kwarg=arguments.kwarg,
        defaults=[dots] * len(arguments.defaults),
    )
    return f"({ast.unparse(cut)})"


def _is_dotted(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Attribute)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return _is_decorated(node, "dataclass")


def _is_decorated(node: Node, name: str) -> bool:
    return any(ast.unparse(one).partition("(")[0].split(".")[-1] == name for one in node.decorator_list)
