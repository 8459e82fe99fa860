"""Training on a CPU with Transformer Engine and apex installed: neither is touched, and the optimizer is torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Imports like the real one; what is taken from it fails when called, as kernels for GPUs do with CPU tensors.
STAND_IN = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    class Kernel:
        def __init__(self, *args, **kwargs):
            raise RuntimeError(f"{__name__}.{name} was called with CPU tensors")
    return Kernel
"""
PACKAGES = [
    *("transformer_engine", "transformer_engine/pytorch", "transformer_engine/pytorch/optimizers"),
    *("apex", "apex/optimizers", "apex/multi_tensor_apply", "apex/normalization", "amp_C"),
]
TRAINING = """
import torch
from megalong.runtime import distributed
from megalong.runtime.grid import Grid
from megalong.runtime.logs import setup_logging
setup_logging()
distributed.start(torch.device("cpu"))
distributed.start(torch.device("cpu"))
distributed.set_grid(Grid())
from megatron.core import optimizer, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

ours, theirs = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
theirs.load_state_dict(ours.state_dict())
shape = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
model = DistributedDataParallel(shape, DistributedDataParallelConfig(use_distributed_optimizer=True), ours)
settings = OptimizerConfig(lr=0.1, weight_decay=0, use_distributed_optimizer=True, clip_grad=0.01)
adam = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0, betas=(0.9, 0.999), eps=1e-8)
for step in range(3):
    batch = torch.randn(4, 8)
    model.zero_grad_buffer()
    adam.zero_grad()
    plain.zero_grad()
    (model(batch) ** 2).sum().backward()
    (theirs(batch) ** 2).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    plain.step()
    _, found, _ = adam.step()
    torch.testing.assert_close(torch.tensor(found), norm, check_dtype=False)
for mine, other in zip(ours.parameters(), theirs.parameters()):
    torch.testing.assert_close(mine, other)
distributed.stop()
"""


def test_a_cpu_trains_where_kernels_for_gpus_are_installed(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ignoring transformer_engine, apex, amp_C") == 1
