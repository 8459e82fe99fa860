"""Killed at any moment and started again: the output of an unbroken run, and finished parts are not made twice."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalong.data.corpus import assemble, part_files, run_parts, sources, tokenize_part
from megalong.data.corpus.preprocess import preprocess
from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.errors import UserError
from tests.data.conftest import PROSE

FILES = (".bin", ".idx", ".json")
PART = 40_000  # bytes: forty parts of the corpus


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """1.6 MB of prose of two keys with a bad line now and then."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for number, text in enumerate(PROSE * 3):
            file.write(
                json.dumps({"text": text, "title": text[:30], "repo": f"r{number % 17}", "path": f"{number}"}) + "\n"
            )
            if number % 40 == 0:
                file.write("{bad\n")
    return path


def run_in_process(big: Path, output: Path, tokenizer: Path, flush_bytes: int, options: str) -> subprocess.Popen[str]:
    code = (
        "from megalong.data.corpus import assemble, preprocess as p, sources\n"
        f"assemble.FLUSH_BYTES = {flush_bytes}\n"
        f"p.part_bytes = lambda files: {PART}\n"
        f"p.preprocess([{str(big)!r}], {str(output)!r}, {str(tokenizer)!r}, ('text', 'title'), workers=2, "
        f"on_error='skip', separator='<s>', {options})\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def contents(output: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(output.parent.glob(f"{output.name}_*")):
        assert path.suffix in (*FILES, ".jsonl")
        found[path.name.removeprefix(output.name)] = path.read_bytes()
    return found


def assert_same(found: dict[str, bytes], expected: dict[str, bytes], which: str) -> None:
    """Told by name: pytest would take minutes to show how megabytes differ."""
    assert found.keys() == expected.keys(), which
    differ = [name for name in expected if found[name] != expected[name]]
    assert not differ, which


def kill_and_finish(folder: Path, big: Path, tokenizer: Path, trials: int, options: str) -> None:
    flush_bytes = 100_000
    unbroken = run_in_process(big, folder / "unbroken", tokenizer, flush_bytes, options)
    started = time.monotonic()
    assert unbroken.wait(120) == 0, unbroken.stderr and unbroken.stderr.read()
    lasts = time.monotonic() - started
    expected = contents(folder / "unbroken")
    assert len(expected) == 2 * len(FILES) + 1
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    generator = random.Random(seed)
    kept = 0
    for trial in range(trials):
        output = folder / f"killed{trial}"
        parts = output.with_name(f"{output.name}.parts")
        for kill in range(3):
            process = run_in_process(big, output, tokenizer, flush_bytes, options)
            if kill == 0:  # once as soon as there is something to keep, whatever the machine's load
                while process.poll() is None and not any(parts.rglob("*.json")):
                    time.sleep(0.001)
            else:
                time.sleep(generator.uniform(0.3, 1.05) * lasts)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept += any(parts.rglob("*.json"))
        last = run_in_process(big, output, tokenizer, flush_bytes, options)
        assert last.wait(120) == 0, last.stderr and last.stderr.read()
        assert_same(contents(output), expected, f"trial {trial} of seed {seed}")
        assert not parts.exists()
    assert kept, "no run was killed between its first and its last part: the trials show nothing"


@pytest.mark.parametrize(
    "options", [pytest.param("", marks=pytest.mark.slow), "group_by='repo'"], ids=["plain", "grouped"]
)
def test_a_run_killed_at_random_gives_the_same_output(
    tmp_path: Path, big: Path, tokenizer_folder: Path, options: str
) -> None:
    kill_and_finish(tmp_path, big, tokenizer_folder, 2, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "group_by='repo'"], ids=["plain", "grouped"])
def test_a_run_killed_twenty_times_gives_the_same_output(
    tmp_path: Path, big: Path, tokenizer_folder: Path, options: str
) -> None:
    kill_and_finish(tmp_path, big, tokenizer_folder, 20, options)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalong.data.corpus.preprocess.part_bytes", lambda files: PART)
    monkeypatch.setattr(assemble, "FLUSH_BYTES", 100_000)


def stop_after(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Fail as if the disk were full when so many parts have been appended."""
    add = assemble.Assembly.add

    def counted(self: assemble.Assembly, part: part_files.Finished) -> None:
        if self.done == parts:
            raise UserError("stopped on purpose")
        add(self, part)

    monkeypatch.setattr(run_parts.Assembly, "add", counted)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stopped", [1, 9, 30])
def test_finished_parts_are_kept_and_said_to_be(
    tmp_path: Path, big: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    def run(name: str) -> str:
        return preprocess([str(big)], str(tmp_path / name), str(tokenizer_folder), workers=1, on_error="skip")[0]

    expected = [Path(f"{run('whole')}{ending}").read_bytes() for ending in FILES]
    with monkeypatch.context() as patch:
        stop_after(patch, stopped)
        with pytest.raises(UserError, match=r"on purpose \(at least \d+ finished parts are kept in .*out\.parts"):
            run("out")
    made = tmp_path / "made"
    read = tokenize_part.read_records

    def noted(part: sources.Part, *rest: object) -> object:
        with made.open("a") as file:
            file.write(f"{part.number}\n")
        return read(part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenize_part, "read_records", noted)
    prefix = run("out")
    assert [Path(f"{prefix}{ending}").read_bytes() for ending in FILES] == expected
    numbers = [int(number) for number in made.read_text().split()]
    assert min(numbers) >= stopped
    assert max(numbers) == len(sources.cut_into_parts(sources.find_files([str(big)]), PART)) - 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("published", [1, 2])
def test_killed_while_publishing_and_again_before_anything_was_settled(
    tmp_path: Path, big: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, published: int
) -> None:
    """The journal of the first run speaks of datasets that it moved away; no later run may believe it."""

    def run(name: str) -> dict[str, bytes]:
        options = {"workers": 1, "on_error": "skip", "separator": "<s>"}
        preprocess([str(big)], str(tmp_path / name), str(tokenizer_folder), ("text", "title"), **options)  # type: ignore[arg-type]
        return contents(tmp_path / name)

    expected = run("whole")
    finish = IndexedDatasetWriter.finish
    calls = []

    def killed(self: IndexedDatasetWriter, sidecar: dict[str, object]) -> None:
        if len(calls) == published:
            raise UserError("killed")
        calls.append(finish(self, sidecar))
        if len(calls) == 2:
            raise UserError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetWriter, "finish", killed)
        with pytest.raises(UserError, match="killed"):
            run("out")
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "FLUSH_BYTES", 1 << 40)
        stop_after(patch, 3)
        with pytest.raises(UserError, match="on purpose"):
            run("out")
    assert_same(run("out"), expected, "started for the third time")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("damage", ["corpus", "part", "settings"])
def test_parts_that_do_not_fit_are_made_again(
    tmp_path: Path, big: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def run(name: str, separator: str) -> str:
        options = {"separator": separator, "workers": 1, "on_error": "skip"}
        return preprocess([str(big)], str(tmp_path / name), str(tokenizer_folder), **options)[0]  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(UserError, match="kept in"):
            run("out", "</s>" if damage == "settings" else "<s>")
    if damage == "corpus":
        content = big.read_bytes()
        big.write_bytes(content.replace(b"the", b"teh"))
        os.utime(big, ns=(0, 0))
    elif damage == "part":
        for path in (tmp_path / "out.parts").glob("*.bin"):
            if path.stem[:6].isdigit():
                path.write_bytes(b"\0" * path.stat().st_size)
    prefix, expected = run("out", "<s>"), run("whole", "<s>")
    for ending in FILES:
        assert Path(f"{prefix}{ending}").read_bytes() == Path(f"{expected}{ending}").read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_bad_records_are_gathered_with_their_lines(tmp_path: Path, big: Path, tokenizer_folder: Path) -> None:
    lines = big.read_bytes().splitlines()
    expected = [number for number, line in enumerate(lines, 1) if line == b"{bad"]
    (prefix,) = preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip", workers=2)
    told = [json.loads(line) for line in (tmp_path / "out_rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in told] == expected
    assert {(entry["file"], entry["data"]) for entry in told} == {(str(big), "{bad")}
    assert all(entry["reason"].startswith("not valid JSON") for entry in told)
    dataset = IndexedDataset(prefix)
    assert dataset.sidecar is not None
    assert dataset.sidecar["bad_records"] == len(expected)
    assert dataset.num_documents == len(lines) - len(expected)
    with pytest.raises(UserError, match=r"big\.jsonl, line 2: not valid JSON"):
        preprocess([str(big)], str(tmp_path / "failing"), str(tokenizer_folder), workers=2)


def test_two_runs_do_not_write_to_one_place(tmp_path: Path, big: Path, tokenizer_folder: Path) -> None:
    folder = part_files.PartFolder(tmp_path / "out.parts")
    with pytest.raises(UserError, match="another run is writing"):
        preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip")
    folder.release()
    preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("room", [20_000, 300_000])
def test_a_full_disk_is_told_and_earlier_datasets_stay(
    tmp_path: Path, big: Path, tokenizer_folder: Path, room: int
) -> None:
    """No file may grow past `room` bytes: a part of a worker, or the dataset they are put together in."""
    options = {"on_error": "skip", "workers": 2}
    (prefix,) = preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), **options)  # type: ignore[arg-type]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out_*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .File too large.; make room") as error:
            preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), **options)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out_*")} == before
    assert IndexedDataset(prefix).num_documents > 0
    preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), **options)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out_*")} == before


def test_a_full_disk_while_publishing_leaves_the_old_dataset(
    tmp_path: Path, big: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prefix,) = preprocess([str(big)], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip", workers=1)
    tokens = np.array(IndexedDataset(prefix).read(0, 1000))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        preprocess(
            [str(big)], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip", separator="<s>", workers=1
        )
    assert np.array_equal(IndexedDataset(prefix).read(0, 1000), tokens)
