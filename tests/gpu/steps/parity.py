"""Ten steps on the GPU are the ten steps of the CPU."""

from __future__ import annotations

from tests.gpu.harness import Trial
from tests.gpu.steps.commands import pytest


def run(trial: Trial) -> None:
    """Run the tests."""
    pytest(trial, "tests/gpu/test_training.py")
