"""Two hundred steps in emulated FP8 end within 1 % of bf16's loss, and the picture of both is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.mark.slow
@pytest.mark.timeout(900)  # three runs of 200 steps, on whatever CPU
def test_the_loss_stays_within_one_percent_of_bf16(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "fp8", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)["figures"]
    assert figures["bf16_last_loss"] < 0.5 * figures["bf16_first_loss"]  # it is learnt
    for ratio in (figures["loss_ratio"], figures["loss_ratio_attention"]):
        assert ratio != 1  # and it is not bf16
        assert ratio == pytest.approx(1, abs=0.01)
    assert (tmp_path / "fp8-loss.png").read_bytes().startswith(b"\x89PNG")
