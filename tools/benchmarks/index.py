"""The sample index of ten million documents: building it, and opening it after another rank has built it.

A rank needs the index to find sample k: the order of an epoch's documents, the running sum of their tokens, the order
of its samples. Naive and masked packing share it. Building is measured from opening the dataset to the index on disk,
opening from opening the dataset to the documents of one sample. The table also has length rules, and the steps of
Megatron-Core's GPTDataset on the same lengths: shuffle documents, walk them sample by sample (its C++ helper), shuffle
samples, save.

Each turn is its own process, so peak memory is that of one side; imports are not counted. Lengths are log-normal (mean
300 tokens); the .bin is a sparse file, because no token is read.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Report

DOCUMENTS, SEQUENCE = 10_000_000, 8192
SAMPLES = 1000
TURNS = 3
RULES: dict[str, Any] = {"drop_below": 10, "below": 64, "keep": 0.1, "above": 1024, "repeat": 2.5}
SIDES = {
    "megatron": "Megatron-Core's steps",
    "naive": "megalong, naive and masked",
    "rules": "megalong, length rules",
}
HERE = Path(__file__).resolve()


def run() -> Report:
    """Measure each side in turn, TURNS times."""
    built: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    opened: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name) / "documents"
        tokens = _write(prefix)
        for turn in range(TURNS):
            for side in SIDES:
                folder = Path(name) / f"{side}-{turn}"
                built[side].append(_measure(side, prefix, folder))
                opened[side].append(_measure(side, prefix, folder))
    figures = {
        "build_s_10m": round(statistics.median(seconds for seconds, _ in built["naive"]), 2),
        "peak_rss_mb": round(max(peak for _, peak in built["naive"])),
        "open_cached_ms": round(1000 * statistics.median(seconds for seconds, _ in opened["naive"]), 1),
    }
    return Report(figures, _table(tokens, built, opened))


def _write(prefix: Path) -> int:
    """Write a dataset of DOCUMENTS documents without their tokens; returns the number of tokens in its index."""
    from megalong.data.indexed import HEADER, MAGIC, TYPE_CODES, VERSION, data_path, index_path

    lengths = np.maximum(1, np.random.default_rng(0).lognormal(5, 1.2, DOCUMENTS)).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with index_path(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, TYPE_CODES["uint16"], DOCUMENTS, DOCUMENTS + 1))
        for array in (lengths, ends - 2 * lengths.astype(np.int64), np.arange(DOCUMENTS + 1)):
            array.tofile(file)
    with data_path(prefix).open("wb") as file:
        file.truncate(int(ends[-1]))
    return int(ends[-1]) // 2


def _measure(side: str, prefix: Path, folder: Path) -> tuple[float, float]:
    """(seconds, peak MB) of one side in its own process, which builds if `folder` is missing, else opens."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[2]}:{HERE.parents[1]}"}
    command = [sys.executable, "-W", "ignore", str(HERE), side, str(prefix), str(folder)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def _table(
    tokens: int, built: dict[str, list[tuple[float, float]]], opened: dict[str, list[tuple[float, float]]]
) -> str:
    theirs = statistics.median(seconds for seconds, _ in built["megatron"])
    lines = [
        f"{DOCUMENTS:,} documents, {tokens:,} tokens, samples of {SEQUENCE:,}; {TURNS} turns, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f} at the end",
        "",
        f"{'':28}{'build s':>9}{'range':>14}{'peak MB':>9}{'ratio':>7}{'open cached ms':>16}{'peak MB':>9}",
    ]
    for side, name in SIDES.items():
        seconds = sorted(one for one, _ in built[side])
        median = statistics.median(seconds)
        lines.append(
            f"{name:28}{median:9.2f}{f'{seconds[0]:.2f}-{seconds[-1]:.2f}':>14}"
            f"{max(peak for _, peak in built[side]):9.0f}{theirs / median:7.2f}"
            f"{1000 * statistics.median(one for one, _ in opened[side]):16.1f}"
            f"{max(peak for _, peak in opened[side]):9.0f}"
        )
    return "\n".join(
        [*lines, "", "ratio: Megatron-Core's seconds over those of the row; peaks include the mapped .idx"]
    )


def _ours(prefix: Path, folder: Path, rules: bool) -> Callable[[], None]:
    from megalong.config.mixture import Domain, Lengths
    from megalong.data.samples.sampler import PackedSamples

    mixture = [Domain(name="a", path=str(prefix), weight=1.0, lengths=Lengths(**RULES) if rules else None)]
    build = not folder.exists()

    def work() -> None:
        packed = PackedSamples(mixture, SEQUENCE, 1234, "99,1", index_folder=folder)
        if build:
            packed.prepare(0, SAMPLES)
        else:
            _ = packed.row(0).starts

    return work


def _megatron(prefix: Path, folder: Path) -> Callable[[], None]:
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    files = [folder / f"{name}.npy" for name in ("document", "sample", "shuffle")]

    def work() -> None:
        dataset = IndexedDataset(str(prefix))
        if folder.exists():
            for file in files:
                np.load(file, mmap_mode="r", allow_pickle=True)
            return
        random = np.random.RandomState(1234)
        chosen = np.arange(round(0.99 * DOCUMENTS), dtype=np.int32)
        lengths = dataset.sequence_lengths.copy()
        documents = _build_document_index(chosen, 1, random, False)
        samples = helpers.build_sample_idx(lengths, documents, SEQUENCE, 1, int(lengths[chosen].sum(dtype=np.int64)))
        folder.mkdir()
        for file, array in zip(files, (documents, samples, _shuffled(len(samples) - 1, random)), strict=True):
            np.save(file, array)

    def _shuffled(count: int, random: np.random.RandomState) -> np.ndarray:
        return np.asarray(_build_shuffle_index(count, count, random))

    return work


def _one_side(side: str, prefix: Path, folder: Path) -> None:
    work = _megatron(prefix, folder) if side == "megatron" else _ours(prefix, folder, side == "rules")
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000]))


if __name__ == "__main__":
    _one_side(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
