"""Training on tasks, joined and plain documents: two context-parallel ranks get one process's loss and gradients."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.config.schema import Config
from megalong.data.corpus.preprocess import preprocess
from tests.data.conftest import PROSE, tokenizer_folder  # noqa: F401
from tests.llama import make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation
from tests.training.gradients import plain_llama, samples_of


@pytest.mark.parametrize("packing", [pytest.param("naive", marks=pytest.mark.slow), "masked"])
def test_two_ranks_train_on_what_one_process_does(
    packing: str,
    tokenizer_folder: Path,  # noqa: F811
    tmp_path: Path,
    pool: WorkerPool,
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE[:20]))
    (data,) = preprocess([str(source)], str(tmp_path / "t"), str(tokenizer_folder), separator="<s>", workers=1)
    llama = make_llama(tmp_path / "hf", vocab_size=601, max_position_embeddings=512)
    settings = run_settings(tmp_path / "run", llama, Path(data))
    kinds: list[dict[str, Any] | None] = [{"task": "needle", "min_length": 200}, None, {"task": "related"}]
    settings["data"] |= {"packing": packing, "seq_length": 262}
    settings["data"]["mixture"] = [
        {"name": f"d{number}", "path": data, "weight": 1.0, "synthetic": kind} for number, kind in enumerate(kinds)
    ]
    alone = pool.run(1, "tests.training.workers:train_steps", settings, 2)
    shared = settings | {"parallel": {"context_parallel_size": 2}}
    ours = pool.run(2, "tests.training.workers:train_steps", shared, 2)
    assert deviation(ours, alone[0]) <= TOLERANCE["fp32"]
    assert alone[0]["loss"][0] == pytest.approx(plain_loss(llama, settings), rel=1e-5)


def plain_loss(llama: Path, settings: dict[str, Any]) -> float:
    """The first step's, by transformers, sample by sample and target by target."""
    model, losses = plain_llama(llama), []
    config = Config.model_validate(settings)
    samples = samples_of(config)
    for k in range(config.training.global_batch_size):
        sample = samples.read(k)
        assert sample.targets is not None
        starts = [*sample.documents[sample.documents < sample.filled].tolist(), sample.filled]
        if not config.data.masked:
            starts = [0, sample.filled]
        for first, end in pairwise(starts):
            tokens = torch.from_numpy(sample.tokens[first:end])
            if len(tokens) > 1:
                logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].float()
                each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
                losses.append(each[torch.from_numpy(sample.targets[first + 1 : end])])
    return float(torch.cat(losses).mean().item())
