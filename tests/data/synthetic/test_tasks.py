"""Tasks are solved from their decoded text; their targets are the answer; length, depth and sample are as declared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalong.config.mixture import Domain
from megalong.data.samples.sampler import PackedSamples
from megalong.data.samples.splitting import documents_of_part
from megalong.data.synthetic.planting import Planter
from megalong.data.synthetic.tasks import draw_task
from megalong.data.tokenizer import TextTokenizer
from tests.data.synthetic.solver import solve

S = 1000
TASKS: dict[str, dict[str, Any]] = {
    "needle": {},
    "multi_key": {"needles": 6},
    "variable_tracking": {"hops": 3, "chains": 2},
    "word_count": {"words": 3},
}


def opened(path: Path, task: str = "needle", seq_length: int = S, part: str = "train", **named: Any) -> PackedSamples:
    settings = {"task": task, **TASKS[task], **named.pop("synthetic", {})}
    mixture = [Domain(name="a", path=str(path), weight=1.0, synthetic=settings)]
    return PackedSamples(mixture, seq_length, named.pop("seed", 5), "80,20", part, **named)


@pytest.mark.parametrize("packing", ["naive", "masked", "best_fit"])
@pytest.mark.parametrize("position", ["between", "before"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_in_the_text_and_is_what_is_learnt(
    task: str, position: str, packing: str, haystacks: dict[str, Path], tokenizer_folder: Path
) -> None:
    tokenizer = TextTokenizer(tokenizer_folder)
    samples = opened(haystacks[position], task, packing=packing, synthetic={"min_length": 800})
    separator, answers = tokenizer.added_id("<s>"), set()
    for k in range(25):
        sample = samples.read(k)
        assert sample.targets is not None
        document = sample.tokens[: sample.filled]
        place = {"between": -1, "before": 0}[position]
        assert document[place] == separator
        assert np.count_nonzero(document == separator) == 1, "separators of the haystack are line breaks"
        assert not sample.tokens[sample.filled :].any()
        assert samples.row(k).starts.tolist() == [0, sample.filled]
        assert sample.documents.tolist() == ([0] if packing == "naive" else [0, sample.filled])
        (learnt,) = np.nonzero(sample.targets)
        assert np.all(np.diff(learnt) == 1)
        assert learnt[-1] == sample.filled - (2 if position == "between" else 1)
        text, answer = (
            tokenizer.decode(document[: learnt[0]].tolist()),
            tokenizer.decode(sample.tokens[learnt].tolist()),
        )
        assert text.endswith("\nAnswer:")
        assert answer == f" {solve(text.removeprefix('<s>'))}"
        answers.add(answer)
    assert len(answers) > 15


def test_the_rest_is_the_datasets_own_text(haystacks: dict[str, Path], tokenizer_folder: Path) -> None:
    """Without what is planted, separators aside, a sample is one run of the stream; training and validation apart."""
    tokenizer = TextTokenizer(tokenizer_folder)
    breaks, seen = {tokenizer.added_id("<s>"), *tokenizer.encode("\n")}, {}
    for part in ("train", "validation"):
        samples = opened(haystacks["between"], "multi_key", part=part)
        stream = samples.streams[0]
        held = np.concatenate([stream.dataset.document(d) for d in documents_of_part(40, "80,20", part, "a")])
        runs = {tuple(held[at : at + 12].tolist()) for at in range(len(held) - 11)}
        found = total = 0
        for k in range(20):
            tokens, keep = samples.row(k).tokens[:], np.ones(S + 1, bool)
            for first, end in samples.row(k).planted:
                keep[first:end] = False
            assert len(samples.row(k).planted) == 7
            keep[samples.row(k).filled :] = False
            text = tokens[keep]
            own = stream.tokens(stream.place_of(k) * S, len(text))
            other = own != text
            assert {*own[other].tolist(), *text[other].tolist()} <= breaks
            windows = [tuple(text[at : at + 12].tolist()) for at in range(0, len(text) - 11, 5)]
            found, total = found + sum(window in runs for window in windows), total + len(windows)
        seen[part] = found / total
    assert min(seen.values()) > 0.9


def test_loss_on_everything(haystacks: dict[str, Path]) -> None:
    alone, whole = (opened(haystacks["between"], synthetic={"loss": loss}) for loss in ("answer", "all"))
    for k in range(3):
        assert whole.read(k).targets is None
        np.testing.assert_array_equal(alone.row(k).tokens[:], whole.row(k).tokens[:])


def test_lengths_are_spread_evenly_and_known_beforehand(haystacks: dict[str, Path]) -> None:
    samples = opened(haystacks["between"], synthetic={"min_length": 300})
    for first in (0, 3000):
        lengths = np.array([samples.row(k).filled for k in range(first, first + 1000)])
        assert (lengths.min(), lengths.max()) == (300, S)
        counts = np.histogram(lengths, bins=8, range=(300, S + 1))[0]
        assert np.all(np.abs(counts - 125) <= 2)
        assert np.corrcoef(lengths[:-1], lengths[1:])[0, 1] < 0.1, "shuffled"
    for count in (1, 999, 1000, 2345):
        assert samples.describe(count)[0].tokens == sum(samples.row(k).filled for k in range(count))
    assert {opened(haystacks["between"]).row(k).filled for k in range(50)} == {S}


def test_depths_are_uniform(haystacks: dict[str, Path]) -> None:
    """By a chi-square of ten bins; 27.9 is passed by chance once in a thousand, and the seed is fixed."""
    samples = opened(haystacks["between"], seq_length=400)
    depths = []
    for k in range(400):
        (first, end), (question, _) = samples.row(k).planted
        depths.append(first / (question - (end - first)))
    counts = np.histogram(depths, bins=10, range=(0, 1))[0]
    assert np.square(counts - 40).sum() / 40 < 27.9, counts


def test_notes_stand_between_sentences(haystacks: dict[str, Path], tokenizer_folder: Path) -> None:
    tokenizer = TextTokenizer(tokenizer_folder)
    planter = Planter(tokenizer)
    text = "It was 3.14 then. Nobody knew" + ", and so on" * 60 + "ä" * 200
    ids = np.array(tokenizer.encode(text))
    for wanted, before in ((9, "It was 3.14 then."), (12, "It was 3.14 then."), (0, "")):
        assert tokenizer.decode(ids[: planter.place(ids, wanted)].tolist()) == before
    for wanted in (len(ids) - 150, len(ids) - 151):
        assert "\ufffd" not in tokenizer.decode(ids[: planter.place(ids, wanted)].tolist())


def test_what_is_drawn_is_frozen() -> None:
    """A change of these words changes the data of resumed runs."""
    settings = Domain(name="a", path="p", weight=1.0, synthetic={"task": "variable_tracking", "hops": 1}).synthetic
    assert settings is not None
    task = draw_task(settings, np.random.RandomState([1, 2, 3]))
    assert (task.planted, task.question, task.answer("")) == FROZEN


FROZEN = (
    [
        "Register DFXVN is set to 30715.",
        "Register EPMRP is set to 57819.",
        "Register MDFJE receives what register DFXVN holds.",
        "Register BQJXD receives what register EPMRP holds.",
    ],
    "Question: which registers hold 30715 at the end of the text above? Name them in the order in which they got it.",
    "DFXVN, MDFJE",
)


PRINTED = """
import hashlib, json, sys
from megalong.config.mixture import Domain
from megalong.data.samples.sampler import PackedSamples
settings = json.loads(sys.argv[2])
packed = PackedSamples([Domain(name="a", path=sys.argv[1], weight=1.0, synthetic=settings)], 1000, 5, "80,20")
print(hashlib.sha256(b"".join(packed.row(k).tokens[:].tobytes() for k in (900, 3))).hexdigest())
"""


@pytest.mark.parametrize("task", ["variable_tracking", "related"])
def test_any_process_makes_the_same_samples(task: str, haystacks: dict[str, Path]) -> None:
    path = haystacks["between"]
    command = [sys.executable, "-c", PRINTED, str(path), f'{{"task": "{task}"}}']
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    mixture = [Domain(name="a", path=str(path), weight=1.0, synthetic={"task": task})]
    packed = PackedSamples(mixture, S, 5, "80,20")
    _ = [packed.row(k).tokens[:] for k in (7, 3)]
    found = hashlib.sha256(b"".join(packed.row(k).tokens[:].tobytes() for k in (900, 3))).hexdigest()
    assert told.stdout.strip() == found
    other = PackedSamples(mixture, S, 6, "80,20")
    assert other.row(3).tokens[:].tolist() != packed.row(3).tokens[:].tolist()
