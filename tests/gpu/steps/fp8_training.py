"""Training steps in FP8 beside bf16, and on Transformer Engine's attention."""

from __future__ import annotations

from tests.gpu.harness import Trial
from tests.gpu.steps.commands import pytest


def run(trial: Trial) -> None:
    """Run the tests."""
    pytest(trial, "tests/gpu/test_transformer_engine.py", "-k", "steps or training")
