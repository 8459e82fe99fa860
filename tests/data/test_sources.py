"""Documents read from files of every kind, and every mistake told with its file and line."""

import gzip
import json
from pathlib import Path

import pytest

from megalong.data.sources import find_files, read_chunks, texts_of
from megalong.errors import UserError

TEXTS = ["one", "", "naïve 数学 🙂", "nul \0 and \r\n kept", " spaces \u2028 too "]


def read(*inputs: Path, keys: tuple[str, ...] = ("text",), chunk_bytes: int = 50) -> list[list[str]]:
    chunks = read_chunks(find_files([str(path) for path in inputs]), chunk_bytes)
    return [texts_of(record, keys) for chunk in chunks for record in chunk.records]


def lines(texts: list[str], ensure_ascii: bool = False, end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=ensure_ascii) + end for text in texts).encode()


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_json_lines(tmp_path: Path, ensure_ascii: bool, end: str) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.JSON.GZ"
    plain.write_bytes(b"\xef\xbb\xbf" + lines(TEXTS, ensure_ascii, end).rstrip())
    packed.write_bytes(gzip.compress(lines(TEXTS[::-1], ensure_ascii, end)))
    assert read(plain, packed) == [[text] for text in TEXTS + TEXTS[::-1]]


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    text = "\n first \r\n\n last \n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt").write_bytes(b"")
    assert read(*sorted(tmp_path.iterdir())) == [[text], [text], [""]]


def test_folders_and_wildcards_are_sorted(tmp_path: Path) -> None:
    for name in ("z.txt", "a/b.txt", "a/a.jsonl", "settings.json", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_files([str(tmp_path)]) == [tmp_path / name for name in ("a/a.jsonl", "a/b.txt", "z.txt")]
    assert find_files([str(tmp_path / "**" / "*.txt")]) == [tmp_path / name for name in ("a/b.txt", "z.txt")]


def test_chunks_bound_what_is_read_at_once_and_tell_the_position(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_bytes(lines(["x" * 80] * 10))
    chunks = list(read_chunks(files, 250))
    assert [len(chunk.records) for chunk in chunks] == [3, 3, 3, 3, 3, 3, 2]
    assert chunks[-1].position == sum(file.stat().st_size for file in files)
    assert {(record.file, record.line) for chunk in chunks for record in chunk.records} == {
        (str(file), line) for file in files for line in range(1, 11)
    }


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"[" * 100000, "not valid JSON"),
        (b"\0", "not valid JSON"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"body": "x"}', "no key 'text' .there are: body."),
        (b'{"text": 5}', "of type int"),
        (b'{"text": null}', "of type NoneType"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "a \\ud800 b"}', "surrogate"),
    ],
)
def test_bad_lines_are_told_with_file_and_number(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines(["fine"]) + b"\n" + line + b"\n" + lines(["fine"]))
    with pytest.raises(UserError, match=told) as error:
        read(path)
    assert f"{path}, line 3:" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_gzip_is_told_with_file_and_line(tmp_path: Path) -> None:
    whole = gzip.compress(lines([str(number) * 50 for number in range(3000)]))
    for name, content in {"cut": whole[:-2000], "tail": whole[:-4], "none": b"not gzip at all", "flip": b""}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content or whole[:600] + b"\xff" * 99 + whole[700:])
        with pytest.raises(UserError, match=rf"{path}, line \d+: (broken gzip|not)"):
            read(path)


def test_absent_and_unknown_inputs_are_told(tmp_path: Path) -> None:
    (tmp_path / "table.parquet").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, told in {
        "absent.jsonl": "does not exist",
        "*.jsonl": "nothing matches",
        "table.parquet": "unknown kind",
        "empty": "holds none of",
    }.items():
        with pytest.raises(UserError, match=told) as error:
            find_files([str(tmp_path / name)])
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(UserError, match="no file given"):
        find_files([])
