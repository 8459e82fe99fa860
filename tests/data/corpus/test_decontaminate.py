"""Shared runs of words: against a search by hand, and from the command to the report."""

import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megalong.data.corpus.decontaminate import Benchmarks
from megalong.data.corpus.preprocess import preprocess
from megalong.data.indexed import IndexedDataset
from megalong.errors import UserError

WORDS = [f"w{number}" for number in range(6)]


def by_hand(benchmark: list[str], text: str, ngram: int) -> bool:
    """Whether any run of words of a benchmark text stands in `text`, by looking for it."""

    def words(of: str) -> list[str]:
        return re.sub(r"[\W_]+", " ", of.lower()).split()

    document = f" {' '.join(words(text))} "
    runs = [words(one)[start : start + ngram] for one in benchmark for start in range(len(words(one)) - ngram + 1)]
    return any(f" {' '.join(run)} " in document for run in runs)


def test_hits_are_those_found_by_hand(tmp_path: Path) -> None:
    """Few different words, so that runs nearly match all the time."""
    generator = random.Random(2)
    benchmark = [" ".join(generator.choices(WORDS, k=generator.randrange(3, 12))) for _ in range(8)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"q": {"x": [text]}}) + "\n" for text in benchmark))
    benchmarks = Benchmarks([str(tmp_path / "b.jsonl")], 4)
    found = [0, 0]
    for _ in range(400):
        text = " ".join(generator.choices([*WORDS, "other"], k=generator.randrange(0, 40)))
        hit = benchmarks.find(["", text])
        found[hit is not None] += 1
        assert (hit is not None) == by_hand(benchmark, text, 4), text
        if hit:
            assert hit.words in text
            assert hit.benchmark == str(tmp_path / "b.jsonl")
    assert min(found) > 50


def test_text_of_a_table_is_found_at_any_depth(tmp_path: Path) -> None:
    """As in JSON lines: multiple-choice benchmarks keep their answers in lists, squad's in structs."""
    one, two, three, four = ("one long text", "two long text", "three long text", "four long text")
    columns = {
        "question": pyarrow.array([one], pyarrow.string_view()),
        "choices": pyarrow.array([[two]], pyarrow.list_(pyarrow.large_string())),
        "answers": [{"text": [three], "start": [1]}],
        "subject": pyarrow.array([four], pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
        "picture": pyarrow.array([b"five long text"], pyarrow.binary()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    benchmarks = Benchmarks([str(tmp_path / "b.parquet")], 3)
    assert all(benchmarks.find([f"a {text} b"]) for text in (one, two, three, four))
    assert benchmarks.find(["five long text", "one short text"]) is None


def test_case_and_punctuation_do_not_hide_a_run(tmp_path: Path) -> None:
    question = "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and"
    for name, content in {
        "a.txt": question,
        "a.json": json.dumps([{"question": question}], indent=1),
        "a.jsonl": json.dumps({"question": question}),
    }.items():
        (tmp_path / name).write_text(content)
        benchmarks = Benchmarks([str(tmp_path / name)])
        text = "… JANET'S ducks -- lay 16 eggs, per day; she eats three\nfor Breakfast every_morning!"
        assert benchmarks.find([text]) is not None
        assert benchmarks.find([text.replace("ducks", "dogs").replace("eggs", "nuts")]) is None
    with pytest.raises(UserError, match=r"a\.txt contains no new run of 50 words"):
        Benchmarks([str(tmp_path / "a.txt")], 50)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not valid JSON"):
        Benchmarks([str(tmp_path / "bad.jsonl")])


@pytest.mark.parametrize("action", ["drop", "report"])
def test_documents_are_dropped_or_reported(tmp_path: Path, tokenizer_folder: Path, action: str) -> None:
    leaked = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (tmp_path / "benchmark.txt").write_text(leaked)
    texts = ["clean", f"begin {leaked} end", leaked.replace("seven", "7"), "also clean"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (prefix,) = preprocess(
        [str(tmp_path / "a.jsonl")],
        str(tmp_path / "out"),
        str(tokenizer_folder),
        decontaminate=[str(tmp_path / "benchmark.txt")],
        decontaminate_action=action,
    )
    dataset = IndexedDataset(prefix)
    assert dataset.num_documents == (3 if action == "drop" else 4)
    assert dataset.sidecar is not None
    assert dataset.sidecar["contaminated_documents"] == 1
    (entry,) = (json.loads(line) for line in (tmp_path / "out_rejected.jsonl").read_text().splitlines())
    assert (entry["line"], entry["data"]) == (2, texts[1])
    assert entry["reason"] == f"shares text with {tmp_path / 'benchmark.txt'}: {leaked}"
    preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), str(tokenizer_folder))
    assert not (tmp_path / "out_rejected.jsonl").exists(), "the report of an earlier run"
