"""Events are whole lines of strict JSON, whatever became of the life before, and never end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalong.training import events


def test_events_are_lines_of_strict_json(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert events.read(run) == []
    events.record(run, 0, "start", world=2)
    events.record(run, 3, "skip", loss=float("nan"), samples=[1, float("inf")])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in (run / events.FILE).read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(0, "start"), (3, "skip")]
    assert (lines[1]["loss"], lines[1]["samples"]) == ("nan", [1, "inf"])
    assert lines == events.read(run)


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    events.record(tmp_path, 1, "save")
    with (tmp_path / events.FILE).open("a") as stream:
        stream.write('{"time": "2026-0')
    events.record(tmp_path, 2, "save")
    assert [event["step"] for event in events.read(tmp_path)] == [1, 2]


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path: Path, megalong_log: pytest.LogCaptureFixture) -> None:
    (tmp_path / events.FILE).mkdir()
    events.record(tmp_path, 1, "save", seconds=2.0)
    assert "'kind': 'save'" in megalong_log.text
