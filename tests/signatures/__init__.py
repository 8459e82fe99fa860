"""Signatures of what is called of Transformer Engine and Megatron-Core, recorded from their sources.

Transformer Engine cannot be imported without CUDA, and of Megatron-Core's two lines one at most is installed. So
`recorded.json` keeps the signatures of all that our code calls, as `python -m tests.signatures` has read them without
importing anything. Stand-ins take no other arguments than those, and every call in our sources is held against
them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("recorded.json")


@functools.cache
def recorded() -> dict[str, dict[str, str]]:
    """By package and version, `transformer_engine 2.20.2`: signatures by dotted name, without `self`."""
    return dict(json.loads(FILE.read_text()))


def signature_of(name: str) -> inspect.Signature:
    """Of a class or function of Transformer Engine, `transformer_engine.pytorch.Linear`."""
    (version,) = (key for key in recorded() if key.startswith("transformer_engine "))
    return parse(recorded()[version][name])


def parse(text: str) -> inspect.Signature:
    """`(a, b=..., *, c)` as a signature."""
    (function,) = ast.parse(f"def function{text}: pass").body
    assert isinstance(function, ast.FunctionDef)
    return inspect.Signature(list(_parameters(function.args)))


def checked(stand_in: Any, name: str) -> Any:
    """A stand-in that is called, and whose modules are called, only with what the real one takes."""
    takes = signature_of(name)

    def made(*arguments: Any, **options: Any) -> Any:
        takes.bind(*arguments, **options)
        found = stand_in(*arguments, **options)
        if isinstance(found, torch.nn.Module):
            forward = signature_of(f"{name}.forward")
            found.register_forward_pre_hook(
                lambda module, args, kwargs: (forward.bind(*args, **kwargs), None)[1], with_kwargs=True
            )
        return found

    return made


def _parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for place, one in enumerate(positional):
        only = place < len(arguments.posonlyargs)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        yield inspect.Parameter(one.arg, kind, default=inspect.Parameter.empty if place < required else ...)
    if arguments.vararg is not None:
        yield inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL)
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        missing = inspect.Parameter.empty if default is None else ...
        yield inspect.Parameter(one.arg, inspect.Parameter.KEYWORD_ONLY, default=missing)
    if arguments.kwarg is not None:
        yield inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD)
