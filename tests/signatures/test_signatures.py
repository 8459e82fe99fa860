"""Every call of Transformer Engine and of Megatron-Core's two lines, held against their real signatures."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.signatures import checked, parse, recorded, signature_of
from tests.signatures.calls import ROOT, calls, calls_in
from tests.signatures.source import Source

DISTRIBUTIONS = {"transformer_engine": "transformer_engine", "megatron": "megatron_core"}
VERSIONS = [version.split() for version in recorded()]


def sources(package: str, version: str) -> Path | None:
    """Where the package of this version lies: installed, or a wheel in `.whl` or the folder MEGALONG_WHEELS."""
    name = DISTRIBUTIONS[package]
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is not None and found.version.partition("+")[0] == version:
        return Path(str(found.locate_file("")))
    for folder in (ROOT / ".whl", Path(os.environ.get("MEGALONG_WHEELS", ROOT / ".whl"))):
        for wheel in sorted(folder.rglob(f"{name}-{version}-*.whl")):
            return wheel
    return None


def test_what_is_recorded() -> None:
    assert [name for name, _ in VERSIONS] == ["megatron", "megatron", "transformer_engine"]


@pytest.mark.parametrize(("package", "version"), VERSIONS, ids=list(recorded()))
def test_every_call_is_one_that_the_package_takes(package: str, version: str) -> None:
    known = recorded()[f"{package} {version}"]
    ours = calls(package)
    assert ours
    unknown = {call.name: call.where for call in ours if call.name not in known}
    assert unknown == {}, "not there, or to be recorded: python -m tests.signatures (its docstring says how)"
    faults = [fault for call in ours if (fault := call.fault(parse(known[call.name]))) is not None]
    assert faults == []


@pytest.mark.parametrize(("package", "version"), VERSIONS, ids=list(recorded()))
def test_the_recording_is_the_packages(package: str, version: str) -> None:
    root = sources(package, version)
    if root is None:
        pytest.skip(f"{package} {version} is neither installed nor a wheel in .whl or the folder MEGALONG_WHEELS")
    source, known = Source(root), recorded()[f"{package} {version}"]
    assert {name: source.signature(name) for name in known} == known


def test_what_is_read_is_what_python_sees() -> None:
    """Of the installed Megatron-Core: names, kinds and which have defaults, by `inspect`."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig

    version = importlib.metadata.version("megatron-core").partition("+")[0]
    known = recorded().get(f"megatron {version}")
    if known is None:
        pytest.skip(f"Megatron-Core {version} is installed, which is not recorded")
    for real, name in (
        (parallel_state.initialize_model_parallel, "megatron.core.parallel_state.initialize_model_parallel"),
        (DistributedDataParallelConfig, "megatron.core.distributed.DistributedDataParallelConfig"),
    ):
        seen, ours = (list(one.parameters.values()) for one in (inspect.signature(real), parse(known[name])))
        empty = inspect.Parameter.empty
        assert [(one.name, one.kind, one.default is empty) for one in ours] == [
            (one.name, one.kind, one.default is empty) for one in seen
        ]


def test_wrong_calls_are_found() -> None:
    text = """
import importlib
from package.part import function as f, other
engine: Any = importlib.import_module("package.engine")
f(1, b=2); f(1, c=2); f(); f(*x); f(*x, c=3); f(**x); f(1, 2, 3)
engine.Made(1); engine(2); unknown(3)
"""
    found = list(calls_in(text, "file", "package"))
    assert sorted({call.name for call in found}) == ["package.engine.Made", "package.part.function"]
    takes = parse("(a, b=...)")
    functions = sorted((call for call in found if call.name.endswith("function")), key=lambda one: one.node.col_offset)
    assert [call.fault(takes) is None for call in functions] == [True, False, False, True, False, True, False]


def test_stand_ins_take_what_the_real_ones_take() -> None:
    class StandIn(torch.nn.Module):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__()

        def forward(self, *arguments: Any, **options: Any) -> str:
            return "called"

    made = checked(StandIn, "transformer_engine.pytorch.Linear")
    layer = made(8, 16, bias=False, params_dtype=torch.float32)
    assert layer("input", is_first_microbatch=True) == "called"
    with pytest.raises(TypeError, match="dtype"):
        made(8, 16, dtype=torch.float32)
    with pytest.raises(TypeError, match="out_features"):
        made(8)
    with pytest.raises(TypeError, match="mask"):
        layer("input", mask=None)
    assert "cp_comm_type" in signature_of("transformer_engine.pytorch.DotProductAttention").parameters
