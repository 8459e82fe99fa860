"""From text files to datasets: the same bytes as Megatron-Core's builder, whole or not there at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from megalong.data.corpus.preprocess import preprocess
from megalong.data.corpus.sources import SMALLEST_PART
from megalong.data.indexed import IndexedDataset
from megalong.data.inspect import inspect
from megalong.errors import UserError
from tests.data.conftest import PROSE

FILES = (".bin", ".idx", ".json")


def contents(prefix: str | Path) -> list[bytes]:
    return [Path(f"{prefix}{ending}").read_bytes() for ending in FILES]


def documents(path: Path, key: str = "text") -> list[str]:
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def with_megatron(folder: Path, texts: list[str], ending: list[int], prefix: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids = ids + ending if ids else []
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    ("flags", "ending", "text"),
    [
        ({}, [], None),
        ({"append_eod": True}, [1], "</s>"),
        ({"separator": "<s>"}, [0], "<s>"),
        ({"separator": "<tool>"}, [600], "<tool>"),
        ({"separator": "\n\n"}, [200, 200], "\n\n"),
    ],
)
def test_output_is_megatrons_byte_for_byte(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path, flags: dict[str, object], ending: list[int], text: str | None
) -> None:
    if text == "\n\n":
        ending = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode(text).ids[1:]
    output = tmp_path / "new" / "folder" / "out"
    (prefix,) = preprocess([str(corpus)], str(output), str(tokenizer_folder), workers=1, **flags)  # type: ignore[arg-type]
    assert prefix == f"{output}_text_document"
    with_megatron(tokenizer_folder, documents(corpus), ending, tmp_path / "theirs")
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    dataset = IndexedDataset(prefix)
    assert dataset.sidecar is not None
    assert dataset.sidecar["separator"] == ({"text": text, "ids": ending, "position": "between"} if text else None)
    assert (dataset.num_documents, dataset.sidecar["empty_documents"]) == (40, 6)
    assert sum(bucket["documents"] for bucket in dataset.sidecar["length_histogram"]) == 34
    assert sum(bucket["tokens"] for bucket in dataset.sidecar["length_histogram"]) == dataset.num_tokens
    assert sorted(path.name for path in output.parent.iterdir()) == sorted(f"out_text_document{end}" for end in FILES)


def test_output_does_not_depend_on_workers_and_keys_are_apart(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = tmp_path / "big.jsonl"
    with corpus.open("w") as file:
        while file.tell() < 2 * SMALLEST_PART:
            file.writelines(json.dumps({"text": text, "title": text[:20]}) + "\n" for text in PROSE)
    (tmp_path / "small.txt").write_text("the end")

    def run(name: str, keys: tuple[str, ...], workers: int, *more: str) -> list[list[bytes]]:
        inputs = [str(corpus), *more]
        prefixes = preprocess(inputs, str(tmp_path / name), str(tokenizer_folder), keys, True, workers=workers)
        assert prefixes == [f"{tmp_path / name}_{key}_document" for key in keys]
        return [contents(prefix) for prefix in prefixes]

    both = run("both", ("text", "title"), 2)
    assert both == run("again", ("text", "title"), 3)
    assert both[1:] == run("title", ("title",), 1)
    data = IndexedDataset(tmp_path / "both_title_document")
    assert data.num_documents == corpus.read_text().count("\n")
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    more = run("more", ("text",), 2, str(tmp_path / "small.txt"))
    assert more[0][0].startswith(both[0][0])
    assert IndexedDataset(tmp_path / "more_text_document").num_documents == data.num_documents + 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inputs": ["absent.jsonl"]}, "absent.jsonl does not exist"),
        ({"tokenizer": "absent"}, "the folder absent does not exist"),
        ({"json_keys": ("body",)}, "line 1: no key 'body'"),
        ({"json_keys": ()}, "name each key once"),
        ({"json_keys": ("text", "text")}, "name each key once"),
        ({"workers": 0}, "0 given"),
        ({"append_eod": True, "separator": "<s>"}, "give one of them"),
        ({"separator": ""}, "has no tokens"),
        ({"output_prefix": "corpus.jsonl/out"}, "cannot be written to"),
        ({"inputs": ["none.jsonl"]}, "empty corpus: no document"),
        ({"inputs": ["none.txt"]}, "empty corpus: 1 documents, all empty"),
        ({"inputs": ["corpus.jsonl", "bad.jsonl"]}, "bad.jsonl, line 2: not valid JSON"),
        ({"separator_position": "before"}, "there is nothing to put there"),
        ({"shard": "0/4"}, "counted from 1"),
        ({"shard": "5/4"}, "counted from 1"),
        ({"shard": "x"}, "counted from 1"),
        ({"group_by": "title"}, "no key 'path'"),
        ({"inputs": ["none.txt"], "group_by": "title"}, "is one text"),
        ({"decontaminate": ["absent.jsonl"]}, "absent.jsonl does not exist"),
        ({"decontaminate": ["short.txt"]}, "contains no new run of 13 words"),
        ({"inputs": ["none.txt"], "json_keys": ("text", "title")}, "is one text"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    tmp_path: Path,
    tokenizer_folder: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none.jsonl").write_text("\n")
    Path("none.txt").write_text("")
    Path("short.txt").write_text("too short")
    Path("bad.jsonl").write_text('{"text": "fine", "title": ""}\n{"text": "cut\n')
    before = sorted(tmp_path.rglob("*"))
    good = {"inputs": [corpus.name], "output_prefix": "out", "tokenizer": str(tokenizer_folder), "workers": 2}
    with pytest.raises(UserError, match=told) as error:
        preprocess(**(good | changes))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_append_eod_needs_an_end_token(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="names no end token"):
        preprocess([str(corpus)], str(tmp_path / "out"), str(tmp_path), append_eod=True)


def command(corpus: Path, output: Path, tokenizer: Path, encoder: str = "gigatoken") -> list[str]:
    words = f"[{str(corpus)!r}], {str(output)!r}, {str(tokenizer)!r}, workers=2, separator='<s>', encoder={encoder!r}"
    call = f"preprocess({words})"
    return [sys.executable, "-c", f"from megalong.data.corpus.preprocess import preprocess; {call}"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_leaves_nothing_that_looks_whole_and_no_process(
    tmp_path: Path, tokenizer_folder: Path, sent: signal.Signals
) -> None:
    corpus = tmp_path / "big.jsonl"
    # Seconds of work for each of two cores: a run that ends before it is killed would show nothing.
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE) * 240)
    for wait in (0.0, 0.1, 0.3):
        output = tmp_path / f"out{wait}"
        process = subprocess.Popen(command(corpus, output, tokenizer_folder, "tokenizers"), stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(f"{output.name}.parts/*.bin")):
            time.sleep(0.005)
        time.sleep(wait)
        workers = children(process.pid)
        process.send_signal(sent)
        try:
            assert process.wait(60) != 0
        finally:
            process.kill()
        with pytest.raises(UserError, match="does not exist"):
            IndexedDataset(f"{output}_text_document")
        wait_until_gone(workers)
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(output.name)]
        assert left in ([], [f"{output.name}.parts"])


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"workers {pids} outlive the run"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_told(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    call = "t.read_records = lambda *_: os.kill(os.getpid(), 9)"
    code = command(corpus, tmp_path / "out", tokenizer_folder)[2]
    code = f"import os, megalong.data.corpus.tokenize_part as t; {call}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "UserError: --workers 1: a worker was killed" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_preprocess_and_inspect_import_no_torch(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    code = command(corpus, tmp_path / "out", tokenizer_folder)[2]
    code += f"; from megalong.data.inspect import inspect; inspect({str(tmp_path / 'out_text_document')!r})"
    code += "; import sys, pkgutil, importlib, megalong.data as data"
    code += "; [importlib.import_module('megalong.data.' + m.name) for m in pkgutil.iter_modules(data.__path__)]"
    code += "; assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    unread = f"megalong: --input: {corpus}: unused keys: title (40 records)\n"
    assert (done.returncode, done.stderr) == (0, unread)
    assert "34 documents" not in done.stdout
    assert "40 documents (6 empty)" in done.stdout


def test_inspect_shows_text_lengths_and_separators(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["Call me Ishmael.\nSome \x1b[31m years", "", "word " * 5000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (prefix,) = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "a"), str(tokenizer_folder), separator="<s>")
    tokens = IndexedDataset(prefix).num_tokens
    inspect(prefix)
    shown = capsys.readouterr().out
    assert "| Call me Ishmael.\n| Some \\x1b[31m years⟦<s>⟧" in shown
    assert "document 1: 0 tokens" in shown
    assert " tokens …⟧" in shown
    assert "'<s>' = [0], between documents" in shown
    assert f"{tokens:,} (uint16, {2 * tokens:,} B)" in shown
    other = tmp_path / "tokenizer.json"
    other.write_text((tokenizer_folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="is not the one"):
        inspect(prefix, tokenizer=str(other))


def test_the_separator_can_stand_before_documents(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, tokenizer = str(tmp_path / "out"), str(tokenizer_folder)
    (prefix,) = preprocess([str(corpus)], output, tokenizer, separator="<s>", separator_position="before")
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    reference.no_truncation()
    dataset = IndexedDataset(prefix)
    for number, text in enumerate(documents(corpus)):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert dataset.document(number).tolist() == ([0, *ids] if ids else [])
    assert dataset.sidecar is not None
    assert dataset.sidecar["separator"] == {"text": "<s>", "ids": [0], "position": "before"}
    capsys.readouterr()
    inspect(prefix, documents=2, png=str(tmp_path / "lengths.png"))
    assert "| ⟦<s>⟧" in capsys.readouterr().out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_ids_of_a_dataset_without_sidecar(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_megatron(tokenizer_folder, ["a", "b"], [0], tmp_path / "theirs")
    first = IndexedDataset(tmp_path / "theirs").document(0).tolist()
    inspect(str(tmp_path / "theirs"), documents=1)
    assert f"document 0: 2 tokens\n| {first[0]} 0" in capsys.readouterr().out
    inspect(str(tmp_path / "theirs"), documents=1, tokenizer=str(tokenizer_folder))
    assert "document 0: 2 tokens\n| a<s>" in capsys.readouterr().out
