"""What a configuration comes to: worked by hand, and the same without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalong.config.attention_checks import Machine
from megalong.config.resolved import Resolved, dump, padded_length, resolve
from megalong.config.schema import Config
from megalong.errors import UserError
from tests.architectures import LLAMA_8B

HOPPER = Machine((9, 0), True)


def config(length: int, batch: int = 8, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "t", "dir": "runs/t"},
        "model": {"architecture": LLAMA_8B.model_dump()},
        "data": {"seq_length": length, "mixture": [{"name": "a", "path": "a", "weight": 1.0}]},
        "optimizer": {"lr": 1e-5},
        "training": {"train_iters": 100, "global_batch_size": batch},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return Config.model_validate(tree)


def test_a_million_tokens_on_256_gpus() -> None:
    """UltraLong's 1M stage: TP 8, CP 4, so 8 replicas, a batch of 8, one micro-batch each, and a ring."""
    parallel = {"tensor_model_parallel_size": 8, "context_parallel_size": 4, "sequence_parallel": True}
    found = resolve(config(2**20, parallel=parallel), LLAMA_8B, HOPPER, 256)
    assert (found.grid.tensor, found.grid.context, found.grid.pipeline, found.grid.heads) == (8, 4, 1, 1)
    assert (found.replicas, found.micro_batches, found.padded_length) == (8, 1, 2**20)
    assert (found.exchange.name, found.backend, found.token_layout) == ("ring", "torch", "zigzag")


def test_short_sequences_share_heads_and_masks_are_balanced() -> None:
    sections = {"parallel": {"context_parallel_size": 4}, "data": {"packing": "masked"}}
    found = resolve(config(8192, 16, **sections), LLAMA_8B, HOPPER, 8)
    assert (found.exchange.name, found.grid.heads, found.token_layout) == ("ulysses", 4, "balanced")
    assert (found.replicas, found.micro_batches) == (2, 8)


@pytest.mark.parametrize(
    ("length", "sections", "padded"),
    [
        (1001, {}, 1001),
        (1001, {"parallel": {"context_parallel_size": 2}}, 1004),
        (1001, {"parallel": {"tensor_model_parallel_size": 8, "sequence_parallel": True}}, 1008),
        (1001, {"precision": {"fp8": "hybrid"}, "parallel": {"context_parallel_size": 3}}, 1008),
        (
            1001,
            {"parallel": {"tensor_model_parallel_size": 4, "context_parallel_size": 3, "sequence_parallel": True}},
            1008,
        ),
    ],
)
def test_a_length_is_rounded_up_to_what_ranks_can_share(length: int, sections: dict[str, Any], padded: int) -> None:
    """2 · CP tokens; CP · TP under sequence parallelism; CP · 8 in FP8; the least common multiple of what applies."""
    assert padded_length(config(length, **sections)) == padded


def test_a_world_that_holds_no_whole_replica_is_refused() -> None:
    with pytest.raises(UserError, match="3 processes cannot hold whole replicas"):
        resolve(config(4096, parallel={"tensor_model_parallel_size": 2}), LLAMA_8B, HOPPER, 3)


def test_it_is_kept_in_the_run_folder(tmp_path: Path) -> None:
    found: Resolved = resolve(config(4096), LLAMA_8B, Machine(), 2)
    dump(found, tmp_path)
    kept = json.loads((tmp_path / "resolved.json").read_text())
    assert kept["grid"] == {"tensor": 1, "context": 1, "pipeline": 1, "virtual": 1, "heads": 1}
    assert (kept["world"], kept["replicas"], kept["exchange"]["name"]) == (2, 2, "none")


def test_it_needs_no_torch() -> None:
    code = "import sys, megalong.config.resolved; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
