"""What the process that ranks are forked from imports (tests/ranks.py); it starts no thread and joins no world."""

import gc

import torch

from megalong.runtime import megatron

megatron.prepare(torch.device("cpu"))

import megalong.cli  # noqa: E402
import megalong.training.launch  # noqa: E402
import megalong.training.lives  # noqa: E402, F401

# Forked ranks neither walk nor copy what was imported here.
gc.collect()
gc.freeze()
