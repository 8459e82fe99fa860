"""`docs/configuration.md`: every key with its allowed values, default and meaning, written from the schema.

    python -m megalong.config.reference > docs/configuration.md

The meaning of a key is the string below it in its class. Python drops these strings at run time, so this module reads
them from the source; a run never does. A key without a default ends its text with `Example: …`. A test validates these
examples and finds keys without a text.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megalong.config.schema import Config

EXAMPLE = re.compile(r"\s*Example: `(.+)`$")
HEAD = """# Configuration

Generated from `megalong/config/` by `python -m megalong.config.reference`; do not edit.

A run is one YAML file with the sections below. `section.key=value` on the command line overrides it. Unknown keys are
refused. `task` is `pretrain` (default) or `sft`. A list `stages:` overrides sections stage by stage; each stage needs a
`name`.
"""


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted name, class) of every section, each followed by the sections inside it."""
    for name, field in Config.model_fields.items():
        yield from _with_inner(name, field)


def meaning(section: type[BaseModel], key: str) -> tuple[str, str | None]:
    """What a key means, and its example as YAML if it has one.

    Raises:
        KeyError: the key has no text.
    """
    text = _texts(_module(section))[section.__name__, key]
    found = EXAMPLE.search(text)
    return EXAMPLE.sub("", text), found[1] if found else None


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *(_section(name, section) for name, section in sections())])


def _with_inner(name: str, field: FieldInfo) -> Iterator[tuple[str, type[BaseModel]]]:
    for section in _classes(field.annotation):
        yield name, section
        for key, inner in section.model_fields.items():
            if not name.endswith("architecture"):  # its rope is model.rope's
                yield from _with_inner(f"{name}.{key}", inner)


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _classes(inner)]


def _section(name: str, section: type[BaseModel]) -> str:
    schema = section.model_json_schema()
    definitions = schema.get("$defs", {})
    lines = [
        f"## {name}",
        "",
        _summary(section),
        "",
        "| key | values | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for key, field in section.model_fields.items():
        text, example = meaning(section, key)
        default = "" if field.default is None else f"`{_shown(schema, key)}`"
        if field.is_required():
            default = "" if "default:" in text else "required"
        if example is not None:
            text = f"{text} Example: `{example}`"
        values = _values(schema["properties"][key], definitions)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key}`", values, default, text)) + " |")
    return "\n".join([*lines, ""])


def _summary(section: type[BaseModel]) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def _shown(schema: dict[str, Any], key: str) -> str:
    text = yaml.safe_dump(schema["properties"][key].get("default"), default_flow_style=True, width=1000)
    return text.splitlines()[0]


def _values(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a value may be, in words: `integer ≥ 1`, `a` or `b`, a section."""
    if "$ref" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(one, definitions) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of: {_values(schema['items'], definitions)}" if "items" in schema else "list"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {_number(schema[name])}" for name, sign in signs.items() if name in schema)
    words = {"string": "text", "boolean": "`true`, `false`"}
    return f"{words.get(kind, kind)} {bounds}".strip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _module(section: type[BaseModel]) -> ModuleType:
    return sys.modules[section.__module__]


@cache
def _texts(module: ModuleType) -> dict[tuple[str, str], str]:
    """(class, key) → the string below the key."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for before, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
            ):
                assert isinstance(after.value, ast.Constant)
                found[node.name, before.target.id] = " ".join(str(after.value.value).split())
    return found


if __name__ == "__main__":
    print(reference(), end="")
