"""Which implementations are taken, and that they are said: in a run's log as in `megalong doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.attention import kernels
from megalong.config.attention_checks import Machine
from megalong.model import implementations as module
from megalong.model.implementations import Choice, implementations, of_this_machine
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool

HOPPER = Machine((9, 0), has_engine=True)
BARE_HOPPER = Machine((9, 0), has_engine=False)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of a GPU as the choices ask for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(kernels, "kernel_of", lambda q: kernels.Choice(kernels.CUDNN, ""))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: empty(*shape, device="meta", **options))
    monkeypatch.setattr("megalong.model.swiglu.why_not_compiled", lambda device: None)
    monkeypatch.setattr(module, "is_nvidia_apex", lambda: False)


@pytest.mark.usefixtures("hopper")
def test_the_fastest_of_a_gpu_has_no_excuse() -> None:
    found = implementations("cuda:0", HOPPER, fp8="hybrid")
    assert [choice.why for _, choice in found.rows()] == [""] * 6
    assert found.optimizer.name == "Transformer Engine's FusedAdam"
    assert found.attention.name == "cudnn"


@pytest.mark.usefixtures("hopper")
def test_what_is_slower_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalong.model.swiglu.why_not_compiled", lambda device: "no C compiler")
    found = implementations("cuda:0", BARE_HOPPER)
    assert str(found.activation) == "SwiGLU in plain torch (no C compiler)"
    assert str(found.optimizer) == (
        "torch's fused AdamW (Transformer Engine cannot be imported, apex is not installed)"
    )
    assert "activation: SwiGLU in plain torch (no C compiler); optimizer: " in str(found)


def test_doctor_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(module, "_found_here", broken)
    assert of_this_machine() == [("will use", "unknown: OSError: libcuda.so.1: cannot open shared object file")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU takes")
def test_a_run_says_what_doctor_says(tmp_path: Path, pool: WorkerPool) -> None:
    settings = run_settings(tmp_path / "run", make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data"))
    pool.run(1, "tests.training.workers:start_run", settings)
    log = tmp_path / "run" / "log.txt"
    (line,) = [line for line in log.read_text().splitlines() if "computes with " in line]
    parts = [text.partition(": ")[2] for text in line.partition("computes with ")[2].split("; ")]
    assert parts == [text for _, text in of_this_machine()]
    assert pool.run(1, "tests.model.workers:adam")[0] == "GroupStepAdamW", "what the log calls torch's fused AdamW"


def test_a_choice_reads_as_its_name_and_the_reason() -> None:
    assert str(Choice("flash")) == "flash"
    assert str(Choice("flash", "no cuDNN")) == "flash (no cuDNN)"
