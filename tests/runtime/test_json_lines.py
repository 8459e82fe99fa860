"""Lines of JSON that survive a kill, and that are cut where a run goes on."""

import json

import pytest

from megalong.runtime import json_lines


def test_what_is_appended_is_read(tmp_path):
    file = tmp_path / "made" / "lines.jsonl"
    assert json_lines.read(file) == []
    json_lines.append(file, {"a": 1, "b": [0.5, float("inf")], "c": {"d": float("nan")}})
    json_lines.append(file, {"a": 2})
    assert json_lines.read(file) == [{"a": 1, "b": [0.5, "inf"], "c": {"d": "nan"}}, {"a": 2}]
    assert [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def test_a_torn_line_is_passed_over_and_closed(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2, "b"')
    json_lines.append(file, {"a": 3})
    assert json_lines.read(file) == [{"a": 1}, {"a": 3}]
    file.write_bytes(b'[1]\n\xff\n{"a": 4}\n')
    assert json_lines.read(file) == [{"a": 4}]


@pytest.mark.parametrize("torn", [b"", b'{"a": 9'])
@pytest.mark.parametrize("last", [0, 2, 9])
def test_it_ends_before_the_first_that_is_refused(last, torn, tmp_path):
    file = tmp_path / "lines.jsonl"
    json_lines.cut(file, lambda values: False)
    assert not file.exists()
    for number in (1, 2, 3):
        json_lines.append(file, {"a": number})
    with file.open("ab") as stream:
        stream.write(torn)
    json_lines.cut(file, lambda values: values["a"] <= last)
    assert json_lines.read(file) == [{"a": number} for number in (1, 2, 3) if number <= last]
