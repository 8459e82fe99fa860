"""Synthetic domains among others: shares of tokens, targets of a batch, commands, fingerprint, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megalong import cli
from megalong.config.load import load_config
from megalong.config.mixture import Domain
from megalong.data.corpus.preprocess import preprocess
from megalong.data.fingerprint import changes, fingerprint
from megalong.data.indexed import sidecar_path
from megalong.data.samples.sampler import PackedSamples
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError
from tests.data.swapped import with_two_ids_swapped

S = 600


def domain(path: Path | str, name: str = "a", weight: float = 1.0, **synthetic: Any) -> Domain:
    return Domain(name=name, path=str(path), weight=weight, synthetic=synthetic or None)


@pytest.mark.parametrize("packing", ["naive", "best_fit"])
def test_weights_are_shares_of_tokens(packing: str, haystacks: dict[str, Path]) -> None:
    """Tasks of 250 to 600 tokens need more samples than their weight."""
    path = haystacks["between"]
    mixture = [
        domain(path, "plain", 0.5),
        domain(path, "tasks", 0.3, task="needle", min_length=250),
        domain(path, "joined", 0.2, task="related"),
    ]
    samples = PackedSamples(mixture, S, 5, "80,20", packing=packing)
    tokens = dict.fromkeys(samples.names, 0)
    for k in range(4000):
        plain = packing == "naive" and samples.domain_of(k) == "plain"
        tokens[samples.domain_of(k)] += S if plain else samples.row(k).filled
    shares = np.array(list(tokens.values())) / sum(tokens.values())
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=2e-3)
    told = samples.describe(4000)
    assert [one.tokens for one in told[:2]] == [tokens["plain"], tokens["tasks"]] or packing == "best_fit"
    assert told[1].tokens == tokens["tasks"]


def test_every_sample_tells_its_targets_where_one_domain_does(haystacks: dict[str, Path]) -> None:
    path = haystacks["between"]
    mixture = [domain(path, "plain"), domain(path, "tasks", task="needle")]
    samples = PackedSamples(mixture, S, 5, "80,20")
    counts = {samples.domain_of(k): samples.read(k).targets for k in range(2)}
    assert counts["plain"] is not None
    assert counts["plain"].all()
    assert counts["tasks"] is not None
    assert 0 < counts["tasks"].sum() < 12
    without = PackedSamples([mixture[0], domain(path, "tasks", task="needle", loss="all")], S, 5, "80,20")
    assert all(without.read(k).targets is None for k in range(2))


@pytest.fixture
def run_file(haystacks: dict[str, Path], tmp_path: Path) -> Path:
    path = str(haystacks["between"])
    tree = {
        "run": {"name": "look", "dir": str(tmp_path / "run")},
        "model": {"load": {"hf": "nowhere"}},
        "data": {
            "seq_length": 1000,
            "packing": "masked",
            "split": "80,20",
            "mixture": [
                {"name": "notes", "path": path, "weight": 1.0, "synthetic": {"task": "multi_key", "min_length": 900}},
                {"name": "joined", "path": path, "weight": 1.0, "synthetic": {"task": "related"}},
            ],
        },
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 4, "global_batch_size": 2},
        "evaluation": {"interval": 2},
    }
    file = tmp_path / "look.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_inspect_shows_notes_question_and_targets(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(run_file), "--samples", "2"]) == 0
    notes, joined = capsys.readouterr().out.split("sample 1 of joined")
    assert notes.startswith("sample 0 of notes: 1,000 tokens to read and one more, 1 documents, masked, ")
    assert notes.count("«") == 5
    assert notes.count("Note to keep in mind: the code of the ") == 4
    assert "padding: tokens " in notes
    answer = notes.split("Answer:⟩ ")[1].split("⟨")[0]
    assert f" is {answer}." in notes
    joined, legend = joined.split("legend: ")
    assert "«" not in joined
    assert "1 documents" in joined
    assert "« » inserted into the text (synthetic)" in legend


def test_plan_tells_what_is_made_up(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "plan", str(run_file), "--png", str(run_file.parent / "p.png")]) == 0
    text = capsys.readouterr().out
    assert "samples of notes are multi_key tasks of 900 to 1,000 tokens in its text; targets: answers" in text
    assert "samples of joined are related documents joined to one" in text
    (row,) = [line for line in text.splitlines() if line.lstrip().startswith("512 to 1,023")]
    assert float(row.split()[5].replace(",", "")) >= 7, "documents in the run"
    assert "never shown" not in text


def test_no_torch_is_imported(run_file: Path) -> None:
    code = (
        "import sys; from megalong.cli import main; "
        f"main(['data', 'inspect', {str(run_file)!r}]); main(['data', 'plan', {str(run_file)!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_resume_is_told_what_changed(run_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    def found(**values: Any) -> dict[str, Any]:
        tree = yaml.safe_load(run_file.read_text())
        tree["data"]["mixture"][0]["synthetic"] |= values
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
        return fingerprint(load_config(tmp_path / "other.yaml")[0])

    before = found()
    assert changes(before, found(needles=8)) == ["data.mixture.notes.synthetic.needles default → 8"]
    assert changes(before, found(loss="all")) == ["data.mixture.notes.synthetic.loss default → all"]
    assert changes(before, found(task="needle")) == ["data.mixture.notes.synthetic.task multi_key → needle"]
    shutil.copytree(tokenizer_folder, tmp_path / "moved")
    named = found(tokenizer=str(tokenizer_folder))
    assert changes(named, found(tokenizer=str(tmp_path / "moved"))) == []


def test_the_tokenizer_must_be_the_datasets(
    haystacks: dict[str, Path], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(tokenizer_folder, gone)
    source = tmp_path / "t.jsonl"
    source.write_text("".join(json.dumps({"text": f"Words and words, number {n}. " * 60}) + "\n" for n in range(20)))
    (prefix,) = preprocess([str(source)], str(tmp_path / "t"), str(gone), workers=1)
    shutil.rmtree(gone)

    def open_it(**synthetic: Any) -> PackedSamples:
        return PackedSamples([domain(prefix, "far", task="needle", **synthetic)], S, 5, "80,20")

    with pytest.raises(
        UserError, match=r"far: synthetic\.tokenizer: the tokenizer that .* is no longer in .*/gone; wr"
    ):
        open_it()
    assert open_it(tokenizer=str(tokenizer_folder)).read(0).filled == S
    with pytest.raises(UserError, match=r"^data\.mixture: far: synthetic\.tokenizer: the folder .*none does not exist"):
        open_it(tokenizer=str(tmp_path / "none"))
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert open_it(tokenizer=str(other)).read(0).filled == S, "another file, and the same ids"
    file.write_text(with_two_ids_swapped(file.read_text()))
    with pytest.raises(UserError, match=r"other is not the tokenizer that .* was made with \(gone, sha256 "):
        open_it(tokenizer=str(other))
    sidecar_path(prefix).unlink()
    with pytest.raises(UserError, match="does not say which tokenizer it was made with; write that tokenizer's folder"):
        open_it()
    samples = open_it(tokenizer=str(tokenizer_folder))
    assert samples.vocabulary_size == 601
    monkeypatch.setattr(TextTokenizer, "vocabulary_size", 70000)
    with pytest.raises(UserError, match=r"has 70000 ids, too many for the uint16 of .*: it was made with another"):
        open_it(tokenizer=str(tokenizer_folder))
    monkeypatch.undo()
    both = [domain(prefix, "far", task="needle", tokenizer=str(other)), domain(haystacks["between"], "near")]
    with pytest.raises(UserError, match="was tokenized with 'other' and 'near' with 'small'"):
        PackedSamples(both, S, 5, "80,20")


def test_tasks_that_do_not_fit_are_refused(haystacks: dict[str, Path]) -> None:
    def open_it(seq_length: int, **synthetic: Any) -> None:
        PackedSamples([domain(haystacks["between"], task="multi_key", **synthetic)], seq_length, 5, "80,20")

    with pytest.raises(
        UserError, match=r"a: data\.seq_length 600: notes, .* of task multi_key take \d+ tokens"
    ) as told:
        open_it(600, needles=40)
    enough = int(str(told.value).rsplit("write ", 1)[1].split()[0])
    open_it(enough, needles=40)
    with pytest.raises(UserError, match=r"a: synthetic\.min_length 20: notes"):
        open_it(600, min_length=20)
