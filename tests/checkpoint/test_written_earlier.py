"""Datasets and checkpoints that an earlier version wrote are read, and a run goes on as that version would have.

written/d91ed3e.tar.xz was made at that commit, on one machine, by its own commands: `data preprocess` of text.jsonl,
`train run.yaml --nproc 2` (TP 2, four steps), of which the checkpoint of step 2 is kept, and `checkpoint export` of
step 4. The losses below are those that it logged.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from megalong.checkpoint.folder import find_checkpoint, read_meta, verify
from megalong.data.corpus.preprocess import preprocess
from megalong.data.indexed import IndexedDataset
from tests.ranks import finish, megalong, start_ranks

WRITTEN = Path(__file__).parent / "written" / "d91ed3e.tar.xz"
LOSSES = {3: 4.1380, 4: 4.0346}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The archive's files."""
    with tarfile.open(WRITTEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_dataset_is_the_one_that_is_written_today(earlier: Path) -> None:
    options = {"workers": 1, "append_eod": True}
    (today,) = preprocess([str(earlier / "text.jsonl")], str(earlier / "today"), str(earlier / "tokenizer"), **options)
    old = IndexedDataset(earlier / "text_text_document")
    assert (old.num_documents, old.sidecar and old.sidecar["tokens"]) == (80, 2886)
    for ending in (".bin", ".idx"):
        assert Path(today + ending).read_bytes() == (earlier / f"text_text_document{ending}").read_bytes()


def test_a_run_resumes_and_ends_where_it_ended(earlier: Path) -> None:
    checkpoint = find_checkpoint(earlier / "run")
    assert read_meta(checkpoint).step == 2
    assert verify(checkpoint) == []
    settings = yaml.safe_load((earlier / "run.yaml").read_text())
    settings["run"]["dir"] = str(earlier / "run")
    settings["data"]["mixture"][0]["path"] = str(earlier / "text_text_document")
    (earlier / "here.yaml").write_text(yaml.safe_dump(settings))
    statuses = finish(start_ranks(["train", str(earlier / "here.yaml")], 2, earlier / "log"))
    logged = (earlier / "log").read_text()
    assert statuses == [0, 0], logged
    assert "changed" not in logged
    losses = {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/4 .*? loss (\S+) ", logged)}
    assert losses == pytest.approx(LOSSES, abs=1.01e-4)
    asked = "--checkpoint", earlier / "run", "--output", earlier / "out", "--dtype", "float32"
    done = megalong("checkpoint", "export", *asked)
    assert done.returncode == 0, done.stderr
    assert_close(load_file(earlier / "out/model.safetensors"), load_file(earlier / "exported/model.safetensors"))
