"""A small configuration on disk, and a way to read it with overrides."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megalong.config.load import load_config
from megalong.config.schema import Config

RUN = """
run: {name: small, dir: runs/small}
model:
  load: {hf: llama}
  rope: {type: yarn, factor: 16}
data:
  seq_length: 4096
  mixture:
    - {name: books, path: data/books, weight: 0.3}
    - {name: code, path: data/code, weight: 0.7}
optimizer: {lr: 3e-5, warmup_iters: 2}
training: {train_iters: 10, global_batch_size: 8}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A valid configuration with the required keys and little more."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


@pytest.fixture
def load(run_file: Path) -> Callable[..., Config]:
    """load("a.b=c", ...) -> the configuration of `run_file` under these overrides."""
    return lambda *overrides: load_config(run_file, list(overrides))[0]
