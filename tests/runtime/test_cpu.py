"""Whoever shares the process with the CPU adapter sees torch as it is; only Megatron-Core is given the CPU for CUDA."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llama import VOCABULARY, make_llama

FACTORIES: dict[str, Callable[..., torch.Tensor]] = {
    "arange": lambda **options: torch.arange(4, **options),
    "empty": lambda **options: torch.empty(4, **options),
    "empty_like": lambda **options: torch.empty_like(torch.empty(4), **options),
    "full": lambda **options: torch.full((4,), 1.0, **options),
    "ones": lambda **options: torch.ones(4, **options),
    "ones_like": lambda **options: torch.ones_like(torch.empty(4), **options),
    "rand": lambda **options: torch.rand(4, **options),
    "randn": lambda **options: torch.randn(4, **options),
    "tensor": lambda **options: torch.tensor([1.0], **options),
    "zeros": lambda **options: torch.zeros(4, **options),
    "zeros_like": lambda **options: torch.zeros_like(torch.empty(4), **options),
    "linspace": lambda **options: torch.linspace(0, 1, 4, **options),
}


def observed(installed: bool, llama: Path) -> dict[str, Any]:
    """What code that knows nothing of the adapter sees, with and without it."""
    if installed:
        from megalong.runtime import megatron

        megatron.prepare(torch.device("cpu"))
    return {**_devices(), **_compilers(), **_random_states(), **_transformers(llama)}


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return type(error).__name__


def _devices() -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def each(**options: Any) -> list[str]:
        return [_outcome(lambda make=make: str(make(**options).device)) for make in FACTORIES.values()]

    seen: dict[str, Any] = {"plain": each(), "keyword": each(device="meta"), "cuda": each(device="cuda")}
    seen["object"], seen["index"] = each(device=torch.device("cuda")), each(device=torch.device("cuda", 0))
    with torch.device("meta"):
        seen["context"], seen["keyword in context"] = each(), each(device="cpu")
        with torch.device("cpu"):
            seen["nested"] = each()
    with torch.device("cuda"):
        seen["cuda context"] = each()
    with FakeTensorMode():
        seen["fake"], seen["fake cuda"] = each(), each(device="cuda")
        with torch.device("meta"):
            seen["fake meta"] = each()
    torch.set_default_device("meta")
    seen["default"] = each()
    torch.set_default_device(None)  # type: ignore[arg-type]
    seen["after"] = each()
    seen["pinned"] = _outcome(lambda: torch.empty(1, pin_memory=True).device.type)
    seen["moved"] = [_outcome(torch.empty(1).cuda), _outcome(torch.nn.Linear(1, 1).cuda)]
    seen["type"] = torch.empty(1).type()
    return seen


def _made(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros([3], dtype=x.dtype) + torch.ones_like(x)


def _compilers() -> dict[str, Any]:
    x = torch.arange(3.0)
    return {
        "scripted": _outcome(lambda: torch.jit.script(_made)(x).tolist()),
        "compiled": _outcome(lambda: torch.compile(_made, backend="eager", fullgraph=True)(x).tolist()),
        "exported": _outcome(lambda: torch.export.export(_Made(), (x,)).module()(x).tolist()),
    }


class _Made(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _made(x)


def _random_states() -> dict[str, Any]:
    torch.manual_seed(1)
    torch.cuda.manual_seed(2)
    first = torch.rand(2).tolist()
    with torch.random.fork_rng():
        torch.rand(1)
    return {"seeded": first, "forked": torch.rand(2).tolist(), "state": _outcome(torch.cuda.get_rng_state)}


def _transformers(llama: Path) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.arange(16)[None] % VOCABULARY).logits
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig.from_pretrained(llama))
    return {
        "inverse frequencies": loaded.model.rotary_emb.inv_freq.tolist(),
        "logits": logits.flatten().tolist(),
        "empty": sorted({one.device.type for one in [*empty.parameters(), *empty.buffers()]}),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without and with the adapter, in a fresh process each."""
    llama = make_llama(tmp_path_factory.mktemp("cpu") / "llama")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as processes:
        plain, adapted = processes.map(observed, [False, True], [llama, llama])
    return plain, adapted


def test_others_see_torch_as_it_is(seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    plain, adapted = seen
    assert adapted == plain
    # What the comparison rests on, worked by hand.
    assert set(plain["context"]) == set(plain["default"]) == set(plain["keyword"]) == {"meta"}
    assert plain["empty"] == ["meta"]
    assert plain["inverse frequencies"] == pytest.approx([10000 ** (-2 * i / 8) for i in range(4)])
    assert plain["compiled"] == plain["scripted"] == plain["exported"] == [1.0, 2.0, 3.0]


ASKING = """
import torch
made = [torch.zeros(2, device="cuda"), torch.empty(2, device=torch.device("cuda", 0)), torch.ones(2).cuda(),
        torch.empty(2, pin_memory=True), torch.zeros(2, device=torch.cuda.current_device())]
with torch.device("meta"):
    made.append(torch.zeros(2, device="cuda"))
found = [one.device.type for one in made], torch.nn.Linear(1, 1).cuda().weight.type(), torch.empty(1).type()
"""


def asked_by_megatron() -> Any:
    """What a module of Megatron-Core's is answered, on a worker with the adapter."""
    from megalong.runtime import megatron

    megatron.prepare(torch.device("cpu"))
    module: dict[str, Any] = {"__name__": "megatron.core.some_module"}
    exec(ASKING, module)
    return module["found"]


def test_megatrons_requests_get_the_cpu(pool: Any) -> None:
    devices, *types = pool.run(1, "tests.runtime.test_cpu:asked_by_megatron")[0]
    assert devices == ["cpu"] * 6
    assert types == ["torch.cuda.FloatTensor"] * 2
