"""`megalong evaluate perplexity` against transformers' own losses, and what it says to a user's mistakes."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.errors import UserError
from megalong.evaluation.buckets import bucket_edges
from megalong.evaluation.command import perplexity
from megalong.evaluation.perplexity import PerplexityResult
from megalong.evaluation.source import find_model, open_held_out
from tests.llama import VOCABULARY, make_dataset, make_llama

LENGTH, SAMPLES = 256, 3  # four times what the model's config promises


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return make_llama(folder / "tiny"), make_dataset(folder / "data")


@pytest.fixture(scope="module")
def expected(sources):
    """Mean loss by position as transformers sees it."""
    return losses_of_transformers(*sources)


def losses_of_transformers(hf, data):
    packed = open_held_out(str(data), LENGTH, SAMPLES, find_model(hf=hf))
    samples = torch.stack([torch.from_numpy(packed.row(k).tokens[:]) for k in range(SAMPLES)])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(hf)(samples[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none")
    return [losses[:, low:high].mean().item() for low, high in pairwise(bucket_edges(LENGTH))]


@pytest.mark.parametrize("world", [1, 2])
def test_losses_by_position_are_transformers(pool, sources, expected, world):
    hf, data = sources
    for means in pool.run(world, "tests.evaluation.workers:position_means", hf, data, LENGTH, SAMPLES):
        assert means == pytest.approx(expected, rel=1e-5)


def test_a_models_own_window_is_measured(pool, sources, expected, tmp_path):
    mistral, data = shutil.copytree(sources[0], tmp_path / "mistral"), sources[1]
    config = json.loads((mistral / "config.json").read_text())
    (mistral / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 11}))
    windowed = losses_of_transformers(mistral, data)
    assert windowed != pytest.approx(expected, rel=1e-3)
    for means in pool.run(2, "tests.evaluation.workers:position_means", mistral, data, LENGTH, SAMPLES):
        assert means == pytest.approx(windowed, rel=1e-5)


@pytest.mark.slow
def test_the_command_writes_numbers_table_and_picture(sources, expected, tmp_path):
    hf, data = sources
    arguments = ["--hf", hf, "--data", data, "--seq-length", LENGTH, "--samples", SAMPLES, "--nproc", 2]
    command = [sys.executable, "-m", "megalong", "evaluate", "perplexity", *map(str, arguments), "--output", tmp_path]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| position |"), done.stdout  # one rank alone speaks
    assert done.stdout.count("| tiny ") == 1
    assert done.stderr.count("--seq-length: 256 positions are used, and the rope of ") == 1
    result = PerplexityResult.load(tmp_path / "perplexity.json")
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx([math.exp(value) for value in expected], rel=1e-5)
    assert result.tokens == [64 * SAMPLES, 64 * SAMPLES, 128 * SAMPLES]
    assert {path.name for path in tmp_path.iterdir()} == {"perplexity.json", "perplexity.md", "perplexity.png"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": []}, "give a model"),
        ({"models": [("rope", "{type: yarn}")]}, "give a model"),
        ({"models": [("hf", "nowhere")]}, "nowhere"),
        ({"models": [("checkpoint", "nowhere")]}, "nowhere has no checkpoint"),
        ({"data": "nowhere"}, "nowhere"),
        ({"data": None}, "give exactly one text"),
        ({"held_out": "all"}, "give exactly one text"),
        (
            {"data": None, "held_out": "all"},
            "--held-out all: only a run has held-out text; give one with --chec",
        ),
        ({"samples": 1000}, r"--samples 1000: .* has only \d+ samples of 256 tokens; write --samples \d+"),
        ({"seq_length": 10**6, "samples": 1}, "has only 0 samples of 1000000 tokens; write a shorter --seq-length"),
        ({"rope": "yarn"}, r"--rope yarn: not a section; write for example --rope '\{type: yarn, factor: 4\}'"),
        ({"rope": "{type: yarm}"}, "--rope: type: "),
        ({"rope": "{factr: 4}"}, r"--rope: factr: unknown key; did you mean factor\?"),
    ],
)
def test_mistakes_are_told_in_one_line(sources, changed, message):
    hf, data = sources
    rope = [("rope", changed.pop("rope"))] if "rope" in changed else []
    arguments = {"models": [("hf", str(hf)), *rope], "data": str(data), "seq_length": LENGTH, "samples": SAMPLES}
    with pytest.raises(UserError, match=message) as error:
        perplexity(**{**arguments, **changed})
    assert "\n" not in str(error.value)


def test_a_dataset_of_another_vocabulary_is_refused(tmp_path):
    small = make_llama(tmp_path / "small", vocab_size=128)
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.arange(300))
        writer.finish({"vocabulary_size": 515})
    with pytest.raises(UserError, match=r"vocabulary of 515, but .*small has 128"):
        open_held_out(str(tmp_path / "data"), LENGTH, 1, find_model(hf=small))


@pytest.mark.parametrize("id", [VOCABULARY, VOCABULARY + 90, 60_000])
def test_ids_that_the_model_does_not_have_are_refused(sources, tmp_path, id):
    """Of a dataset that does not tell its vocabulary: in the padding of the model's table, and beyond it."""
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.arange(2, 400, dtype=np.uint16))
        writer.add_document(np.array([5, id], np.uint16))
        writer.finish()
    with pytest.raises(
        UserError, match=rf"data: document 1 contains the id {id} \(token 1 of it\), but there are 515 ids"
    ):
        open_held_out(str(tmp_path / "data"), 64, 1, find_model(hf=sources[0]))
