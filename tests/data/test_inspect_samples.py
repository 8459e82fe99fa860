"""Samples as `data inspect CONFIG` shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megalong import cli
from megalong.attention.layout import TokenLayout
from megalong.config.load import load_config
from megalong.data.corpus.preprocess import preprocess
from megalong.data.inspect_samples import describe, positions_of, targets_of
from megalong.data.samples.sample import Sample
from megalong.data.samples.sampler import PackedSamples
from tests.pool import WorkerPool

NONE: dict[str, object] = {"ids": [], "text": ""}
TEXTS = ["Call me Ishmael.", "Some years ago, never mind how long."]


@pytest.fixture
def run_file(tokenizer_folder: Path, tmp_path: Path) -> Path:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    preprocess([str(source)], str(tmp_path / "books"), str(tokenizer_folder), separator="<s>", workers=1)
    tree = {
        "run": {"name": "look", "dir": str(tmp_path / "run")},
        "model": {"load": {"hf": "nowhere"}},
        "data": {
            "seq_length": 48,
            "packing": "masked",
            "split": "100,0",
            "mixture": [{"name": "books", "path": str(tmp_path / "books_text_document"), "weight": 1.0}],
        },
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 4, "global_batch_size": 2},
    }
    file = tmp_path / "look.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_text_separators_and_bounds_are_seen(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(run_file), "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("48 tokens to read and one more") == 2
    assert "⟦<s>⟧" in printed
    assert printed.splitlines()[-1] == (
        "legend: ⟨ ⟩ read, but not a target (loss mask) | ⟦ ⟧ a separator, or how much is not shown"
    )
    assert "| ⟨S⟩ome years ago, never mind how long." in printed  # what begins a document is predicted by nothing
    assert "sample 0 of books" in printed
    assert cli.main(["data", "inspect", str(run_file), "data.packing=naive", "--samples", "1"]) == 0
    assert "documents that see each other, 48 targets" in capsys.readouterr().out


@pytest.mark.parametrize("packing", ["naive", "masked", "best_fit"])
def test_packs_are_shown_document_by_document(packing: str, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is listed is every token once; documents are the dataset's own, or pieces of them; padding is empty."""
    tree = yaml.safe_load(run_file.read_text())
    tree["data"].update(packing=packing)
    tree["data"]["mixture"][0]["seq_length"] = 24
    run_file.write_text(yaml.safe_dump(tree))
    assert cli.main(["data", "inspect", str(run_file), "--samples", "4"]) == 0
    packed = PackedSamples(load_config(run_file)[0].data.mixture, 48, 1234, "100,0", packing=packing)
    for k, printed in enumerate(capsys.readouterr().out.split("\n\n")[:4]):
        found = re.findall(r"^  (document \d+|padding): tokens (\d+) to (\d+)", printed, re.MULTILINE)
        spans = [(int(first), int(last) + 1) for _, first, last in found]
        assert [spans[0][0], *(end for _, end in spans)] == [first for first, _ in spans] + [49]
        for (kind, _, _), (first, end) in zip(found, spans, strict=True):
            assert (kind == "padding") == (not packed.row(k).tokens[first:end].any())
        assert [end - first for (kind, *_), (first, end) in zip(found, spans, strict=True) if kind != "padding"] == (
            packed.row(k).lengths.tolist()
        )
        assert ("in 2 masked packs" in printed) == (packing == "naive")


def test_a_prefix_takes_no_overrides(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(run_file.parent / "books_text_document")
    assert cli.main(["data", "inspect", prefix]) == 0
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", prefix, "data.packing=naive"])
    assert "only a CONFIG.yaml has keys" in capsys.readouterr().err


def test_what_is_no_target_and_where_positions_are_skipped() -> None:
    targets = np.array([False, True, False, True, True, True, True])
    sample = Sample(np.arange(10, 17), np.array([0, 4]), 6, np.array([0, 1, 70, 71, 72, 5]), targets)
    assert describe(sample, "one", True, None, {"ids": [13], "text": "|"}).splitlines() == [
        "one: 6 tokens to read and one more, 2 documents, masked, 3 targets",
        "  document 0: tokens 0 to 3, positions 0 to 1, 70 to 71, 2 targets",
        "  | ⟨10⟩ 11 ⟨12⟩ ⟦13⟧",
        "  document 1: tokens 4 to 5, positions 72 to 72, 5 to 5, 1 targets",
        "  | ⟨14⟩ 15",
        "  padding: tokens 6 to 6",
    ]


@pytest.mark.parametrize("packing", ["naive", "masked", "best_fit"])
def test_it_shows_what_training_is_given(packing: str, run_file: Path, pool: WorkerPool) -> None:
    """Loss mask and positions are those of the micro-batch that the model gets."""
    pool.run(1, "tests.data.test_inspect_samples:compare", packing, run_file)


def compare(packing: str, run_file: Path) -> None:
    """In a worker, because Megatron-Core on CPU changes its process."""
    from megalong.runtime import distributed

    distributed.start(torch.device("cpu"))
    from tests.batches.whole import shard_samples

    try:
        config = load_config(run_file)[0]
        packed = PackedSamples(config.data.mixture, 48, 1, "100,0", packing=packing)
        masked = packing != "naive"
        for k in range(5):
            sample = packed.read(k)
            batch = shard_samples(
                torch.from_numpy(sample.tokens[:])[None],
                TokenLayout(),
                0,
                documents=[sample.documents] if masked else None,
                filled=[sample.filled],
            )
            np.testing.assert_array_equal(batch.loss_mask[0].numpy() > 0, targets_of(sample, masked)[1:])
            np.testing.assert_array_equal(batch.positions[0].numpy(), positions_of(sample, masked))
    finally:
        distributed.clear_grid()


def test_no_torch_is_imported(run_file: Path) -> None:
    code = (
        "import sys; from megalong.cli import main; "
        f"main(['data', 'inspect', {str(run_file)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
