"""A line is as good for conversations as it is for a corpus and a benchmark; Python's `json` says what it means."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megalong.config.sft import Sft
from megalong.data.corpus.decontaminate import Benchmarks
from megalong.data.corpus.records import BadRecordError, texts_of
from megalong.data.corpus.sources import find_files
from megalong.errors import UserError
from megalong.sft.prepare import prepare
from megalong.sft.records import Unreadable, records
from tests.sft.chats import make_tokenizer

TURNS = '[{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "It was the cat."}]'
GOOD = {
    "NaN": '"score": NaN',
    "infinity": '"score": [Infinity, -Infinity]',
    "a huge number": '"score": 123456789012345678901234567890, "x": 1e999',
    "half a surrogate pair elsewhere": '"id": "\\ud800"',
    "half a surrogate pair as a key": '"\\udc00": 1',
    "a word of JSON in a text": '"id": "of \\"messages\\": and \\"text\\": again"',
}
BAD = {
    "cut": ('"score": 1, "b', "not valid JSON"),
    "NULL": ('"score": NULL', "not valid JSON"),
    "the key twice": ('"text": "b", "messages": []', "occurs twice"),
    "the key twice, spelled": ('"te\\u0078t": "b", "messa\\u0067es": [], "n": NaN', "occurs twice"),
    "not UTF-8": ('"id": "\udcff"', "not UTF-8"),
}


def line(more: str) -> bytes:
    return ('{"text": "a", "messages": ' + TURNS + ", " + more + "}\n").encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_line_is_what_json_says(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(GOOD[kind]))
    ((place, found, _),) = records(find_files([str(tmp_path / "a.jsonl")])[0])
    assert place.endswith("a.jsonl, line 1")
    assert repr(found) == repr(json.loads(line(GOOD[kind])))
    assert texts_of(line(GOOD[kind]), ["text"]) == ["a"]
    Benchmarks([str(tmp_path / "a.jsonl")], 3)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_bad_for_both(kind: str, tmp_path: Path) -> None:
    more, why = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(line(more))
    ((_, found, _),) = records(find_files([str(tmp_path / "a.jsonl")])[0])
    assert isinstance(found, Unreadable)
    assert why in found.why
    with pytest.raises(BadRecordError, match=why):
        texts_of(line(more), ["text"])
    if why != "occurs twice":
        with pytest.raises(UserError, match=rf"--decontaminate: .*a\.jsonl, line 1: {why}"):
            Benchmarks([str(tmp_path / "a.jsonl")], 3)


def test_a_key_twice_in_a_turn_is_refused(tmp_path: Path) -> None:
    """Nobody could say which content is meant; in a document's metadata it is no matter."""
    twice = '{"messages": [{"role": "user", "content": "a", "content" : "b"}]}\n'
    (tmp_path / "a.jsonl").write_text(twice)
    ((_, found, _),) = records(find_files([str(tmp_path / "a.jsonl")])[0])
    assert found == Unreadable("key 'content' occurs twice in one object; keep one")


def test_lines_are_counted_and_told_as_for_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mark at the start, blank lines, Windows' line ends; keys and words that no file could hold."""
    folder = make_tokenizer(tmp_path / "tokenizer", "chatml")
    good = line(GOOD["half a surrogate pair as a key"]).rstrip() + b"\r\n"
    half = b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}\n'
    role = b'{"messages": [{"role": "\\ud800", "content": "x"}]}\n'
    keys = b'{"\\ud800": "x"}\n'
    tools = b'{"tools": "[{\\"name\\": \\"\\\\ud800\\"}]", "messages": ' + TURNS.encode() + b"}\n"
    content = b"\xef\xbb\xbf\r\n \n" + good + b"\n" + half + role + keys + tools + b"\t\n" + good.rstrip()
    for name, raw in (("a.jsonl", content), ("b.jsonl.gz", gzip.compress(content)), ("c.jsonl", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(raw)
        places = [place.split(", ")[1] for place, _, _ in records(find_files([str(tmp_path / name)])[0])]
        assert places == ([] if name == "c.jsonl" else [f"line {n}" for n in (3, 5, 6, 7, 8, 10)])
    sft = Sft(sources=[{"name": "a", "path": str(tmp_path / "a.jsonl")}], on_malformed="drop", on_unknown_role="drop")
    report = prepare(sft, 200, folder, tmp_path / "index").report["a"]
    assert report["counts"] == {"malformed": 3, "unknown_role": 1, "duplicate": 1}
    assert [one.partition(": ")[0][-6:] for one in report["examples"]["malformed"]] == ["line 5", "line 7", "line 8"]
    assert "half a surrogate pair, '\\ud800', is not text" in report["examples"]["malformed"][0]
    assert r"keys \ud800 match no format" in report["examples"]["malformed"][1]
    assert r"unused keys: text (2 records), \udc00 (2)" in capsys.readouterr().err
