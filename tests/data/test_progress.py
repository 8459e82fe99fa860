"""Lines of progress, worked out by hand, and those of real runs."""

import io
import re
from pathlib import Path

import pytest

from megalong.data import progress
from megalong.data.merge import merge
from megalong.data.progress import Progress
from tests.data.conftest import PROSE
from tests.data.corpus.test_grouping import BUCKETS, code, run, small  # noqa: F401


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_says_how_far_how_fast_and_how_long(clock: Clock) -> None:
    log = io.StringIO()
    told = Progress(50_000_000, log, doing="reading")
    for clock.now, position, documents in ((105.0, 1, 1), (110.0, 20_000_000, 3_000), (115.0, 30_000_000, 4_000)):
        told.update(position, documents)
    told.finish()
    assert log.getvalue() == (
        "reading: 20.0 MB of 50.0 MB (40%) | 3,000 documents | 300 documents/s | 2.0 MB/s | ETA 0:00:15\n"
    )


def test_what_an_earlier_run_did_is_far_but_not_fast(clock: Clock) -> None:
    told = Progress(100_000_000, io.StringIO(), position=80_000_000, documents=9_000)
    assert told.line(80_000_000, 9_000).endswith(
        "(80%) | 9,000 documents | 0 documents/s | 0.0 MB/s | ETA not known yet"
    )
    clock.now += 10
    line = told.line(90_000_000, 9_500)
    assert line == "90.0 MB of 100.0 MB (90%) | 9,500 documents | 50 documents/s | 1.0 MB/s | ETA 0:00:10"


def test_rates_are_those_of_the_last_minute(clock: Clock) -> None:
    """Ten minutes at 10 MB/s, then at 1 MB/s: 200 MB more take 200 s, and not the 20 s of the mean."""
    told, position = Progress(10**10, Terminal()), 0
    for second in range(700):
        clock.now, position = 100.0 + second, position + (10_000_000 if second < 600 else 1_000_000)
        told.update(position, second)
    assert "| 1.0 MB/s | ETA" in told.line(position, 700)


def test_a_terminal_has_one_moving_line(clock: Clock) -> None:
    terminal = Terminal()
    told = Progress(10, terminal)
    for clock.now in (100.1, 100.3, 100.4, 100.6):
        told.update(5, 1)
    told.finish()
    assert re.fullmatch(r"(\r5?0.0 MB.*?\x1b\[K){2}\r\x1b\[K", terminal.getvalue())


@pytest.mark.usefixtures("code", "small")
def test_grouping_tells_both_its_readings(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    total = (tmp_path / "code.jsonl").stat().st_size / 1e6
    run(tmp_path, tokenizer_folder, "out", workers=1)
    printed = capsys.readouterr()
    (documents,) = re.findall(r"([\d,]+) documents \(", printed.out)
    dealt, tokenized = ([line for line in printed.err.splitlines() if f"{n} of 2: " in line] for n in (1, 2))
    assert len(dealt) > 3
    assert len(tokenized) == BUCKETS
    assert dealt[-1].startswith(
        f"sorting into groups, 1 of 2: {total:,.1f} MB of {total:,.1f} MB (100%) | {2 * len(PROSE)} records |"
    )
    assert re.match(r"tokenizing groups, 2 of 2: ([\d.]+) MB of \1 MB \(100%\)", tokenized[-1])
    assert f" | {documents} documents | " in tokenized[-1]
    done = [int(re.findall(r"(\d+)%", line)[0]) for line in tokenized]
    assert done == sorted(done)
    assert 0 < done[0] < done[-2] < 100


@pytest.mark.usefixtures("code", "small")
def test_merging_is_told(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [run(tmp_path, tokenizer_folder, "out", shard=f"{place}/2") for place in (1, 2)]
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    capsys.readouterr()
    merge(shards, str(tmp_path / "merged"))
    printed = capsys.readouterr()
    (documents,) = re.findall(r"([\d,]+) documents", printed.out)
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert f"(100%) | {documents} documents | " in lines[-1]
