"""The harness of the first run on a GPU with toy steps, and its own steps at rehearsal's sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import harness
from tests.gpu.exact import exact_attention
from tests.gpu.gpu_time import busy
from tests.gpu.harness import Harness, Outcome, table
from tests.gpu.steps import STEPS
from tests.gpu.steps.packs import waits_of
from tests.tools import toys

FIRST_RUN = Path(__file__).parents[1] / "gpu" / "first_run.py"


def run_toys(folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: Any, **options: Any) -> list[Outcome]:
    monkeypatch.setenv("OUT", str(folder))
    return Harness([str(Path(toys.__file__))], rehearse=True, **options).run(steps)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "first_run.jsonl").read_text().splitlines()]


def test_a_step_that_fails_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("broken", "wrong", "dying", "lacking", "good")
    outcomes = run_toys(tmp_path, monkeypatch, *(toys.step(name) for name in names))
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "failed", "skipped", "passed"]
    assert outcomes[0].why == "KeyError: 'absent'"
    assert outcomes[1].why == "far: dq off by nan, over 0.01; broken part: RuntimeError: no such kernel"
    assert outcomes[2].why == "exit status -6"
    assert outcomes[3].why == "it needs the package nothing"
    assert outcomes[4].headlines == ["rate 123.5"]
    told = lines(tmp_path)
    assert {"step": "wrong", "figure": "after it", "value": 1} in told
    assert {"step": "dying", "figure": "before", "value": 1} in told
    assert {"step": "good", "figure": "lost", "value": "nan"} in told
    assert [line["status"] for line in told if "status" in line] == [outcome.status for outcome in outcomes]
    shown = capsys.readouterr().out
    assert "    a line for the log\n" in shown  # the end of its log, for one that failed
    rows = table(outcomes).splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [[o.step.name, o.status] for o in outcomes]


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GRACE", 3.0)
    outcomes = run_toys(tmp_path, monkeypatch, toys.step("hanging", 1.0), toys.step("good"))
    assert [outcome.status for outcome in outcomes] == ["timed out", "passed"]
    assert outcomes[0].why == "no end after 5 s"
    child = next(line["value"] for line in lines(tmp_path) if line.get("figure") == "child")
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_that_no_longer_fit_are_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run_toys(tmp_path, monkeypatch, toys.step("broken", 100.0), toys.step("good", 1.0), seconds=20)
    assert [outcome.status for outcome in outcomes] == ["skipped", "passed"]
    assert outcomes[0].why == "100 s no longer fit into the budget"
    assert lines(tmp_path)[0] == {
        "step": "broken", "status": "skipped", "seconds": 0.0, "why": "100 s no longer fit into the budget"
    }  # fmt: skip


def first_run(*arguments: str, **environment: str) -> Any:
    command = [sys.executable, str(FIRST_RUN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_the_first_pass_takes_eight_minutes_by_its_own_estimate() -> None:
    listed = first_run("--list").stdout.splitlines()
    assert [line.split()[2] for line in listed[:-1]] == [step.name for step in STEPS]
    assert listed[-1].split()[5] == f"{len(STEPS) - 1};", "the last one is for the time that is left"
    assert sum(float(line.split()[0]) for line in listed[:-2]) == float(listed[-1].split()[0]) <= 480


def test_wrong_arguments_and_a_machine_without_a_gpu_end_with_2() -> None:
    done = first_run("--only", "everything")
    assert done.returncode == 2
    assert "invalid choice: 'everything'" in done.stderr
    if not torch.cuda.is_available():
        done = first_run()
        assert (done.returncode, done.stdout) == (2, "")
        assert "torch sees no GPU here; --rehearse runs the same code on the CPU" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rehearsal_finds_nothing_wrong(tmp_path: Path) -> None:
    names = [step.name for step in STEPS]
    done = first_run("--rehearse", "--only", *names, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    told = lines(tmp_path)
    assert [line["step"] for line in told if "status" in line] == names
    assert all(line["passed"] for line in told if "check" in line)
    rates = [line["value"] for line in told if "TFLOP/s" in line.get("figure", "")]
    assert rates
    assert set(rates) == {None}  # nothing is measured where there is no GPU


def test_exact_attention_is_torch_s_in_float64() -> None:
    """Against autograd through torch's own attention."""
    for queries, keys, causal in ((12, 12, True), (5, 9, False)):
        q, k, v, grad = (
            torch.randn(length, 2, heads, 8, dtype=torch.float64, requires_grad=True)
            for length, heads in ((queries, 6), (keys, 3), (keys, 3), (queries, 6))
        )
        ours = exact_attention(q.detach(), k.detach(), v.detach(), grad.detach(), causal, 0.7)
        heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, scale=0.7, enable_gqa=True
        ).permute(2, 0, 1, 3)
        truth = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for name, true in zip(("out", "dq", "dk", "dv"), truth, strict=True):
            torch.testing.assert_close(ours[name], true.detach(), rtol=1e-10, atol=1e-10)


def test_busy_time_counts_what_overlaps_once() -> None:
    assert busy([(0, 10), (5, 12), (6, 7), (20, 25)]) == 17
    assert busy([]) == 0


def test_waits_are_counted_by_the_line_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns at each; other warnings are none."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def work() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    found = waits_of(work, torch.device("cuda"))
    assert found is not None
    assert list(found.values()) == [3]
    assert next(iter(found)).startswith("tests/tools/test_first_run.py:")
    assert modes == ["warn", "default"]
