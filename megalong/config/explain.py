"""Turn pydantic's report of an invalid configuration into one line.

    run.yaml: training.train_iter: unknown key; did you mean train_iters?
    command line: data.seq_length: '1M' is not a whole number; write 1048576

Of several problems, only the first is shown. Unknown keys come before all others, because a typo is often reported
twice: as an unknown key and as a missing key.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megalong.errors import UserError

_SIZES = {"k": 1024, "m": 1024**2, "g": 1024**3}


def explain(error: ValidationError, root: type[BaseModel], source: Callable[[str], str]) -> UserError:
    """The `UserError` for a failed validation of `root`; `source(key)` names the file or the command line."""
    reports = error.errors(include_url=False)
    report = next((r for r in reports if r["type"] == "extra_forbidden"), reports[0])
    path, models = _walk(root, report["loc"])
    if report["type"].endswith("_type"):
        # If several types are allowed, an error about the value says more than "not of the other type".
        same = (r for r in reports if _walk(root, r["loc"])[0] == path)
        report = next((r for r in same if not r["type"].endswith("_type")), report)
    key = _dotted(path)
    message = _message(report, models, root)
    return UserError(": ".join(part for part in (source(key), key, message) if part))


def nearest(word: str, known: list[str]) -> str | None:
    """The known word most similar to `word`, or None if none is close."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def _walk(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """The part of a pydantic location that the user wrote, and the sections along it."""
    path: list[int | str] = []
    models = [root]
    annotation: Any = root
    for part in location:
        if isinstance(part, int):
            path.append(part)
            continue
        section = _section(annotation)
        if section is None:
            break  # below a plain field, pydantic names the member of a union, which the user did not write
        path.append(part)
        field = section.model_fields.get(part)
        if field is None:
            break
        annotation = field.annotation
        inner = _section(annotation)
        if inner is not None:
            models.append(inner)
    return path, models


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple):
        return next((found for arg in get_args(annotation) if (found := _section(arg))), None)
    return None


def _dotted(path: list[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _message(report: Any, models: list[type[BaseModel]], root: type[BaseModel]) -> str:
    kind, value, context = report["type"], report["input"], report.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(report["loc"][-1]), models[-1], root)
    if kind == "missing":
        return "is missing and has no default; add it" + _needs(
            models[-1] if _is_section_missing(report, models) else None
        )
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        near = nearest(str(value), re.findall(r"'([^']+)'", context["expected"]))
        return f"{value!r} is not one of {context['expected']}" + (f"; did you mean {near}?" if near else "")
    if kind in _BOUNDS:
        sign, bound = _BOUNDS[kind]
        return f"{value!r} is out of range; it must be {sign} {context[bound]}"
    return _wrong_type(kind, value, report["msg"])


_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def _wrong_type(kind: str, value: Any, message: str) -> str:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return f"{shown} is not a whole number" + _size_hint(value)
    return {
        "float_type": f"{shown} is not a number" + _quoted_number(value),
        "finite_number": f"{shown} is not a finite number",
        "bool_type": f"{shown} is not a boolean; write true or false",
        "string_type": f"{shown} is not text; write it in quotes",
        "string_too_short": "is empty; write a value, or leave the key out",
        "string_pattern_mismatch": f"{shown} is not a valid name; write letters, digits, '.', '_' and '-' only",
        "model_type": f"{shown} is not a section; write it as `key: value` lines below",
        "tuple_type": f"{shown} is not a list; write its entries as `- ` lines",
        "too_short": "is an empty list; add an entry",
    }.get(kind, f"{shown}: {message}")


def _size_hint(value: Any) -> str:
    """What to write for `1M` or `128k` (powers of two in this field), for a whole float and for a quoted number."""
    if isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    match = (
        re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg])i?b?", value.strip(), re.IGNORECASE) if isinstance(value, str) else None
    )
    if match and (size := float(match[1]) * _SIZES[match[2].lower()]).is_integer():
        return f"; write {int(size)}"
    return _quoted_number(value)


def _quoted_number(value: Any) -> str:
    """What to write for a number in quotes, or with leading zeros, which YAML 1.1 reads as octal."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if math.isnan(number):
        return ""
    return "; write it without leading zeros" if re.match(r"[-+]?0\d", value) else "; write it without quotes"


def _is_section_missing(report: Any, models: list[type[BaseModel]]) -> bool:
    last = models[-2].model_fields.get(str(report["loc"][-1])) if len(models) > 1 else None
    return last is not None and _section(last.annotation) is models[-1]


def _needs(section: type[BaseModel] | None) -> str:
    names = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
    return f" with {', '.join(names)}" if names else ""


def _unknown_key(name: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    """Suggest the section that has this key; else the most similar key of this section; else list its keys."""
    elsewhere = [key for key in _all_keys(root) if key.rpartition(".")[2] == name]
    near = elsewhere[0] if elsewhere else nearest(name, list(section.model_fields))
    if near is not None:
        return f"unknown key; did you mean {near}?"
    return f"unknown key; this section has: {', '.join(section.model_fields)}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")
