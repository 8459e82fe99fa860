"""`tools/benchmark.py gpu`: its rows, their estimates and its figures, tried at a tiny size on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pool import WorkerPool

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from benchmarks.gpu import Results  # noqa: E402
from benchmarks.gpu.device import median_time  # noqa: E402
from benchmarks.gpu.rows import QUICK_SECONDS, Choice, architecture, chosen, estimate  # noqa: E402
from benchmarks.gpu.theirs import TheirTraining  # noqa: E402


def benchmark(*arguments: str) -> Any:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_quick_rows_fit_into_eight_minutes() -> None:
    assert estimate(chosen(Choice(quick=True))) <= QUICK_SECONDS == 480


def test_rows_are_what_was_asked_for() -> None:
    names = {row.name for row in chosen(Choice())}
    for size in ("1b", "8b_eighth"):
        for length in ("8k", "32k", "128k", "256k"):
            for side in ("ours/bf16", "ours/fp8", "transformers/bf16"):
                assert f"{size}/{length}/{side}" in names
    assert [row.name for row in chosen(Choice(rows=["1b/8k/*"], skip=["*/fp8"]))] == [
        "1b/8k/ours/bf16",
        "1b/8k/transformers/bf16",
    ]


def test_sizes_are_those_of_llama() -> None:
    """By transformers' own count of parameters: 1,235,814,400 are those of Llama 3.2 1B."""
    with torch.device("meta"):
        small = TheirTraining(architecture("1b"), torch.device("meta")).model
        eighth = TheirTraining(architecture("8b_eighth"), torch.device("meta")).model
    assert small.num_parameters() == 1_235_814_400
    # Of 8,030,261,248 the final norm is the one part that an eighth cannot have.
    assert eighth.num_parameters() == (8_030_261_248 - 4096) / 8 + 4096


def test_both_sides_begin_at_the_loss_of_a_guess(pool: WorkerPool) -> None:
    """The mean over tokens of an untrained model is the logarithm of its vocabulary, on either side."""
    guess = pytest.approx(math.log(500), rel=0.02)
    assert TheirTraining(architecture("tiny"), torch.device("cpu")).step(64, 2) == guess
    assert pool.run(1, "tests.tools.workers:first_losses", "tiny", 64, 2)[0] == [guess, guess]


def test_figures_have_the_names_that_are_documented() -> None:
    results = Results("cuda", 0.0)
    results._add({"device": "a GPU", "matmul": 790e12})
    step = {"tflops": 300.0, "mfu": 0.3, "peak_gib": 50.0, "step_s": 2.0}
    results._add({"row": "1b/8k/ours/bf16", "figures": {**step, "tokens_per_s": 3000.0}})
    results._add({"row": "1b/8k/ours/fp8", "figures": {**step, "tokens_per_s": 4000.0}})
    results._add({"row": "1b/8k/transformers/bf16", "figures": {**step, "tokens_per_s": 2000.0}})
    results._add({"row": "1b/128k/ours/bf16", "failed": "out of memory", "out_of_memory": True})
    results._add({"row": "1b/256k/ours/bf16", "skipped": "a shorter one ran out of memory"})
    results._add({"row": "attention/32k/te_fp8", "figures": {"tflops": 800.0}})
    figures = results.figures()
    assert figures["matmul_tflops"] == 790
    assert figures["1b_8k_bf16_ratio_vs_transformers"] == 1.5
    assert figures["1b_8k_fp8_ratio_vs_transformers"] == 2
    assert figures["1b_128k_ours_bf16_out_of_memory"] == 1
    assert figures["te_fp8_tflops_32k"] == 800
    assert not [name for name in figures if "256k" in name]
    table = results.table(chosen(Choice(rows=["1b/*/ours/bf16"], skip=["*/32k/*"])))
    assert "out of memory" in table
    assert "101%" in results.table(chosen(Choice(rows=["attention/32k/te_fp8"])))


def test_the_median_is_taken_of_single_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pretended device's clock: seconds in turn 9 (warm-up), 1, 5, 2; then the budget is spent."""
    clock, times = [0.0], iter([9.0, 1.0, 5.0, 2.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    def work() -> None:
        clock[0] += next(times)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert median_time(work, torch.device("cuda"), 3.0) == 2.0
    assert next(times, None) is None


@pytest.mark.slow
def test_every_kind_of_row_runs_on_the_cpu() -> None:
    done = benchmark("gpu", "--tiny", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["benchmark"] == "gpu"
    kinds = ("tokens_per_s", "tflops", "mfu", "peak_gib", "step_s")
    expected = {f"tiny_256_{side}_{kind}" for side in ("ours_bf16", "ours_fp8", "transformers_bf16") for kind in kinds}
    ratios = {"tiny_256_bf16_ratio_vs_transformers", "tiny_256_fp8_ratio_vs_transformers"}
    assert set(told["figures"]) == expected | ratios | {"matmul_tflops", "ours_tflops_256"}
    assert all(value > 0 for value in told["figures"].values())


def test_options_are_gpu_s_alone_and_a_machine_without_one_is_told() -> None:
    done = benchmark("step", "--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--quick is for gpu, not for step" in done.stderr
    if not torch.cuda.is_available():
        done = benchmark("gpu")
        assert done.returncode == 1
        assert done.stderr == "benchmark gpu: torch sees no GPU here; run it on a machine that has one\n"
