"""Training with document masks is training on each document alone, whatever the layout and the exchange.

The reference is a plain transformers Llama that reads every document of a sample by itself, from position 0, in a
batch of one, and knows nothing of packing. Lengths that context parallelism does not divide are among the settings:
what is padded must not be seen in a single number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.config.schema import Config
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation
from tests.training.gradients import plain_llama, samples_of
from tests.training.test_transformers import plain_adamw, set_learning_rate

STEPS = 6
Layouts = dict[str, dict[str, Any]]
LAYOUTS: Layouts = {
    "one process": {},
    "TP2xCP2 full": {
        "parallel": {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        "memory": {"recompute": "full"},
    },
    "PP2xCP2 selective": {
        "parallel": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
        "memory": {"recompute": "selective"},
    },
    "CP4 all-gather zigzag": {
        "parallel": {"context_parallel_size": 4},
        "attention": {"exchange": "all_gather", "layout": "zigzag"},
    },
    "CP4 ulysses": {"parallel": {"context_parallel_size": 4}, "attention": {"exchange": "ulysses"}},
    "CP4 two levels per document": {
        "parallel": {"context_parallel_size": 4},
        "attention": {"exchange": "ring_ulysses", "ulysses_size": 2, "layout": "per_document_zigzag"},
    },
}


def documents(settings: dict[str, Any], step: int) -> Iterator[list[int]]:
    """Every document, or part of one, in a global batch, with the token after a sample if it belongs to the last."""
    config = Config.model_validate(settings)
    samples, size = samples_of(config), config.training.global_batch_size
    for k in range(step * size, (step + 1) * size):
        row = samples.row(k)
        tokens, starts, filled = row.tokens[:].tolist(), row.starts, row.filled
        for begin, end in pairwise([*starts[starts < filled].tolist(), filled]):
            yield tokens[begin:end]


def plain_steps(llama: Path, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Loss and gradient norm before clipping, document by document."""
    model, options = plain_llama(llama), settings["optimizer"]
    adamw = plain_adamw(model, options)
    results: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in range(STEPS):
        adamw.zero_grad()
        losses = []
        for document in documents(settings, step):
            if len(document) > 1:
                tokens = torch.tensor([document])
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
                losses.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none"))
        loss = torch.cat(losses).mean()
        loss.backward()
        results["loss"].append(loss.item())
        results["norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        set_learning_rate(adamw, step + 1, options)
        adamw.step()
    return results


@pytest.mark.parametrize(
    ("packing", "length"),
    [("masked", 61), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("masked", 64), ("best_fit", 61)))],
)
def test_masked_packing_is_training_on_each_document_alone(
    packing: str, length: int, tmp_path: Path, pool: WorkerPool
) -> None:
    llama, data = make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data")
    settings = run_settings(tmp_path / "run", llama, data)
    settings["data"] |= {"packing": packing, "seq_length": length}
    plain = plain_steps(llama, settings)
    for name, changes in LAYOUTS.items():
        parallel = changes.get("parallel", {})
        world = parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1)
        world *= parallel.get("context_parallel_size", 1)
        ours = pool.run(world, "tests.training.workers:train_steps", settings | changes, STEPS)
        assert deviation(ours, plain) <= TOLERANCE["fp32"], name


def test_without_the_mask_it_is_something_else(tmp_path: Path, pool: WorkerPool) -> None:
    llama, data = make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data")
    settings = run_settings(tmp_path / "run", llama, data)
    masked = settings | {"data": settings["data"] | {"packing": "masked"}}
    naive = pool.run(1, "tests.training.workers:train_steps", settings, 1)
    assert deviation(naive, {key: values[:1] for key, values in plain_steps(llama, masked).items()}) > 5e-4


def test_a_window_is_the_same_under_every_exchange(tmp_path: Path, pool: WorkerPool) -> None:
    """And changes something: a layer that sees 7 tokens is not one that sees all."""
    llama, data = make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data")
    settings = run_settings(tmp_path / "run", llama, data)
    settings["attention"] = {"window_size": 7, "window_attn_skip_freq": 2}
    alone = pool.run(1, "tests.training.workers:train_steps", settings, 2)[0]
    for exchange in ("ring", "all_gather", "ulysses"):
        shared = settings | {
            "parallel": {"context_parallel_size": 2},
            "attention": settings["attention"] | {"exchange": exchange},
        }
        ours = pool.run(2, "tests.training.workers:train_steps", shared, 2)
        assert deviation(ours, alone) <= TOLERANCE["fp32"], exchange
    for pattern in (None, [1, 1, 0, 1]):
        other = settings | {"attention": {"window_size": 7, "window_attn_skip_freq": pattern}}
        assert deviation(pool.run(1, "tests.training.workers:train_steps", other, 2), alone) > 1e-4
