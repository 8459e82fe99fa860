"""Keys of a corpus that nothing reads: counted by hand, told once a file, whatever parts and workers there are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megalong.data.corpus import preprocess as command
from megalong.data.corpus import tokenize_part
from megalong.data.corpus.keys import HARMLESS, Unread, listed
from megalong.data.corpus.preprocess import preprocess

START, MIDDLE = "megalong: --input: ", ": unused keys: "


def written(path: Path, records: list[dict[str, object]]) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def told(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "unused keys" in line]


@pytest.mark.parametrize("workers", [1, 3])
def test_keys_are_told_once_a_file(
    workers: int,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "part_bytes", lambda files: 100)  # several parts a file
    folder = tmp_path / "corpus"
    folder.mkdir()
    records: list[dict[str, object]] = [
        {"text": f"text {n}", "id": n, "URL": "u", "title": "t", **({"messages": []} if n % 3 == 0 else {})}
        for n in range(10)
    ]
    written(folder / "a.jsonl", [*records, {"title": "bad", "odd": 1}])
    written(folder / "b.jsonl.gz", records)
    written(folder / "c.jsonl", [{"text": "only", "meta": {"title": 1}}])
    table = pyarrow.table({"text": ["x", "y", None], "prompt": ["a", "b", "c"], "score": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    (folder / "e.txt").write_text("plain")
    out = tmp_path / str(workers)
    preprocess([str(folder)], str(out), str(tokenizer_folder), workers=workers, on_error="skip")
    assert told(capsys.readouterr().err) == [
        f"{START}{folder}/a.jsonl and 1 more files{MIDDLE}title (20 records), messages (8)",
        f"{START}{folder}/d.parquet{MIDDLE}prompt (2 records)",
    ]
    preprocess([str(folder / "a.jsonl")], str(out), str(tokenizer_folder), ["text", "title"], on_error="skip")
    assert told(capsys.readouterr().err) == [f"{START}{folder}/a.jsonl{MIDDLE}messages (4 records)"]
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("finished", [0, 2])
def test_parts_of_a_run_that_failed_are_counted_too(
    finished: int,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "part_bytes", lambda files: 30)
    path = written(tmp_path / "a.jsonl", [{"text": f"{n}", "title": "t", "repo": "r", "path": "p"} for n in range(6)])
    fingerprint = tokenize_part.TokenizePart.fingerprint

    def refused(task: tokenize_part.TokenizePart, part: object) -> str:
        if capsys.readouterr() and part.number == finished:  # type: ignore[attr-defined]
            raise RuntimeError("on purpose")
        return fingerprint(task, part)  # type: ignore[arg-type]

    def run(**options: object) -> list[str]:
        preprocess([str(path)], str(tmp_path / "o"), str(tokenizer_folder), workers=1, **options)  # type: ignore[arg-type]
        return told(capsys.readouterr().err)

    wanted = [f"{START}{path}{MIDDLE}title (6 records)"]
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_part.TokenizePart, "fingerprint", refused)
        with pytest.raises(RuntimeError, match="on purpose"):
            run()
    assert run() == wanted
    assert run(group_by="repo") == wanted


def test_many_keys_are_few_words() -> None:
    counts = {f"k{n}": 1 for n in range(20)} | {"all": 3}
    assert listed(counts).startswith("all (3 records), k0 (1), ")
    assert listed(counts).endswith(", k10 (1) and 9 more keys")
    assert listed({"x": 1}) == "x (1 record)"
    assert not {"messages", "system", "prompt", "title", "name", "tools", "weight", "mask", "loss"} & HARMLESS
    unread = Unread()
    unread.add("a", ())
    assert list(unread.lines()) == []
