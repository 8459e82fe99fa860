"""Tokenizing 125 MB and 2 GB of JSON lines: `megalong data preprocess` against one `tokenizers` process per worker.

The corpus is the sources of the standard library and of the installed packages. The tokenizer is a byte-level BPE of
128,000 entries that splits text like Llama 3's and is trained on a part of the corpus. Times are from the start of the
process to its end, with the files on disk. The other side has the design of Megatron-LM's tool: processes of a pool
decode and tokenize one line each and return lists of ids to the parent, which writes them.

Peak memory is the sum of the resident sizes of all processes of a run; shared pages are counted in each process. The 2
GB are copies of the corpus with permuted letters, so no word occurs in two copies and a cache of words must grow if it
can.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import string
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import Report

BYTES, COPIES = 125_000_000, 16
VOCABULARY, TRAINED_ON = 128_000, 30_000_000
WORKERS = 2
TURNS = 5
POLL_SECONDS = 0.01
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
HERE = Path(__file__).resolve()


def run() -> Report:
    """Measure; both sides must write the same tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = _write_corpus(folder / "corpus.jsonl")
        _train(folder / "tokenizer", folder / "corpus.jsonl")
        ours = [_measure(_ours(folder, "corpus")) for _ in range(TURNS)]
        theirs = _measure(_theirs(folder))
        ours += [_measure(_ours(folder, "corpus")) for _ in range(TURNS)]
        if (folder / "corpus_text_document.bin").read_bytes() != (folder / "theirs.bin").read_bytes():
            raise AssertionError("the two sides wrote different tokens")
        (folder / "theirs.bin").unlink()
        parts = _parts_of_the_time(folder)
        _write_copies(folder)
        large = _measure(_ours(folder, "large"))
    seconds = statistics.median(wall for wall, _ in ours)
    figures = {
        "wall_s_125mb": round(seconds, 2),
        "ratio_vs_tokenizers_workers": round(theirs[0] / seconds, 1),
        "peak_rss_mb_125mb": round(max(peak for _, peak in ours)),
        "peak_rss_mb_2gb": round(large[1]),
    }
    return Report(figures, _table(figures, ours, theirs, large, parts, lines))


def _write_corpus(path: Path) -> int:
    """Write BYTES of JSON lines of source files; returns the number of lines. Files repeat if there are too few."""
    written = lines = 0
    with path.open("wb") as out:
        while written < BYTES:
            for source in _sources():
                line = json.dumps({"text": source, "meta": {"lines": source.count("\n")}}).encode() + b"\n"
                written, lines = written + out.write(line), lines + 1
                if written >= BYTES:
                    break
    return lines


def _sources() -> Iterator[str]:
    for root in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[root]).rglob("*.py")):
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def _write_copies(folder: Path) -> None:
    """Write COPIES copies of the corpus, each with another permutation of the letters."""
    with (folder / "large.jsonl").open("wb") as out:
        for copy in range(COPIES):
            letters = string.ascii_lowercase[copy:] + string.ascii_lowercase[:copy]
            table = str.maketrans(string.ascii_lowercase, letters)
            with (folder / "corpus.jsonl").open() as corpus:
                for line in corpus:
                    text = json.loads(line)["text"].translate(table)
                    out.write(json.dumps({"text": text}).encode() + b"\n")


def _train(folder: Path, corpus: Path) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        with corpus.open() as file:
            read = 0
            for number, line in enumerate(file):
                if number % (BYTES // TRAINED_ON) == 0 and read < TRAINED_ON:
                    read += len(line)
                    yield json.loads(line)["text"]

    tokenizer.train_from_iterator(texts(), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def _ours(folder: Path, name: str) -> list[str]:
    words = ["--input", f"{folder}/{name}.jsonl", "--output-prefix", f"{folder}/{name}"]
    words += ["--tokenizer", f"{folder}/tokenizer", "--workers", str(WORKERS)]
    return [sys.executable, "-m", "megalong", "data", "preprocess", *words]


def _theirs(folder: Path) -> list[str]:
    files = [f"{folder}/tokenizer/tokenizer.json", f"{folder}/corpus.jsonl", f"{folder}/theirs.bin"]
    return [sys.executable, str(HERE), *files]


def _measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MB) of a command and all its processes."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[2]}:{HERE.parents[1]}"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peak))
    watcher.start()
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    seconds = time.perf_counter() - started
    watcher.join()
    return seconds, peak[0] / 1e6


def _watch(process: psutil.Process, peak: list[int]) -> None:
    """Record the peak of the sum of resident sizes until the process ends."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        try:
            for one in (process, *process.children(recursive=True)):
                total += one.memory_info().rss
        except psutil.Error:
            continue
        peak[0] = max(peak[0], total)
        time.sleep(POLL_SECONDS)


def _parts_of_the_time(folder: Path) -> list[tuple[str, float]]:
    """Seconds of one core for each part of the work on the corpus, and for the start."""
    import gigatoken
    import orjson

    steps: list[tuple[str, float]] = []

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        steps.append((name, time.perf_counter() - started))
        return result

    lines = timed("reading, from the page cache", (folder / "corpus.jsonl").read_bytes).splitlines()
    texts = timed("JSON (orjson)", lambda: [orjson.loads(line)["text"].encode() for line in lines])
    tokenizer = gigatoken.Tokenizer.from_json((folder / "tokenizer" / "tokenizer.json").read_bytes()).backend
    ids = timed("tokenizing (gigatoken)", lambda: [tokenizer.encode(text) for text in texts])
    timed("writing and waiting for the disk", lambda: _write(folder / "ids", ids))
    (folder / "ids").unlink()
    (folder / "one.jsonl").write_text('{"text": "one"}\n')
    steps.append(("start: Python, both tokenizers, one document", _measure(_ours(folder, "one"))[0]))
    return steps


def _write(path: Path, ids: list[Any]) -> None:
    with path.open("wb") as file:
        file.writelines(ids)
        file.flush()
        os.fsync(file.fileno())


def _table(
    figures: dict[str, float],
    ours: list[tuple[float, float]],
    theirs: tuple[float, float],
    large: tuple[float, float],
    parts: list[tuple[str, float]],
    lines: int,
) -> str:
    walls = sorted(wall for wall, _ in ours)
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    rows = [
        f"{BYTES / 1e6:.0f} MB of JSON lines ({lines:,} documents), {VOCABULARY:,} entries, {WORKERS} workers, "
        f"{os.cpu_count()} cores, {load}",
        "",
        "                                seconds      MB/s   peak MB",
        f"tokenizers, process per worker {theirs[0]:8.2f} {BYTES / 1e6 / theirs[0]:9.1f} {theirs[1]:9.0f}",
        f"megalong                       {figures['wall_s_125mb']:8.2f} {BYTES / 1e6 / figures['wall_s_125mb']:9.1f} "
        f"{figures['peak_rss_mb_125mb']:9.0f}   (median of {len(ours)}; {walls[0]:.2f} to {walls[-1]:.2f})",
        f"megalong, {COPIES} times as much     {large[0]:8.2f} {COPIES * BYTES / 1e6 / large[0]:9.1f} {large[1]:9.0f}",
        f"ratio_vs_tokenizers_workers {figures['ratio_vs_tokenizers_workers']}",
        "",
        "parts of the work, seconds of one core:",
        *(f"  {seconds:6.2f}  {name}" for name, seconds in parts),
    ]
    return "\n".join(rows)


class _Encoder:
    """The work of a process of the other side; the tokenizer is loaded once per process."""

    tokenizer: Tokenizer

    def __init__(self, file: str) -> None:
        self.file = file

    def start(self) -> None:
        """Load the tokenizer."""
        _Encoder.tokenizer = Tokenizer.from_file(self.file)

    def encode(self, line: str) -> list[int]:
        """Ids of the line's text."""
        return list(_Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids)


def _tokenizers_side(tokenizer: str, corpus: str, output: str) -> None:
    import numpy as np

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = _Encoder(tokenizer)
    with (
        multiprocessing.Pool(WORKERS, initializer=encoder.start) as pool,
        open(corpus, encoding="utf-8") as lines,
        open(output, "wb") as out,
    ):
        for ids in pool.imap(encoder.encode, lines, 32):
            out.write(np.array(ids, np.int32).tobytes())


if __name__ == "__main__":
    _tokenizers_side(*sys.argv[1:])
