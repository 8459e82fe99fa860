"""Documents read from files of every kind, cut anywhere, and every mistake told with its file and line."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.data.corpus.records import Bad, line_number, read_records
from megalong.data.corpus.sources import cut_into_parts, find_files, part_bytes
from megalong.errors import UserError

TEXTS = ["one", "", "naïve 数学 🙂", "nul \0 and \r\n kept", " spaces \u2028 too "]


def read(*inputs: Path, keys: tuple[str, ...] = ("text",), size: int = 50) -> list[list[str]]:
    parts = cut_into_parts(find_files([str(path) for path in inputs]), size)
    assert [part.number for part in parts] == list(range(len(parts)))
    return [record.texts for part in parts for record in read_records(part, keys)]


def lines(texts: list[str], ensure_ascii: bool = False, end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=ensure_ascii) + end for text in texts).encode()


def zst(content: bytes) -> bytes:
    """Two frames, as files that were appended to have."""
    packer = zstandard.ZstdCompressor()
    return packer.compress(content[: len(content) // 2]) + packer.compress(content[len(content) // 2 :])


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("size", [7, 50, 10**6])
def test_json_lines(tmp_path: Path, ensure_ascii: bool, end: str, size: int) -> None:
    plain, gzipped, packed = tmp_path / "a.jsonl", tmp_path / "b.JSON.GZ", tmp_path / "c.jsonl.zst"
    plain.write_bytes(b"\xef\xbb\xbf" + lines(TEXTS, ensure_ascii, end).rstrip())
    gzipped.write_bytes(gzip.compress(lines(TEXTS[::-1], ensure_ascii, end)))
    packed.write_bytes(zst(b"\xef\xbb\xbf" + lines(TEXTS, ensure_ascii, end)))
    assert read(plain, gzipped, packed, size=size) == [[text] for text in TEXTS + TEXTS[::-1] + TEXTS]


def test_what_orjson_refuses_and_json_takes_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    big = "9" * 30
    path.write_bytes(b'{"text": "x", "a": NaN, "b": -Infinity, "c": %s, "d": "\\ud800"}\n' % big.encode())
    assert read(path) == [["x"]]


def test_a_key_elsewhere_is_not_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = 'of "text": and \\"text" : again'
    inside = json.dumps({"text": text, "kind": "text", "meta": {"text": 1, "a": [{"text": 2}]}})
    path.write_text('{"meta": {"text": 0, "text": 1}, "text": "x", "a": 1, "a": 2}\n' + inside + "\n")
    assert read(path) == [["x"], [text]]


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    text = "\n first \r\n\n last \n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt.zst").write_bytes(zst(text.encode()))
    assert read(*sorted(tmp_path.iterdir())) == [[text], [text], [""], [text]]


def table(path: Path, texts: list[str | None], **options: object) -> None:
    columns = {"id": list(range(len(texts))), "text": texts, "title": [str(text)[:3] for text in texts]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3, **options)


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("size", [1, 10**6])
def test_rows_of_a_table(tmp_path: Path, compression: str, size: int) -> None:
    path = tmp_path / "a.parquet"
    table(path, TEXTS * 3, compression=compression)
    assert read(path, keys=("title", "text"), size=size) == [[text[:3], text] for text in TEXTS * 3]


def test_bad_rows_and_columns_of_a_table_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, ["a", "b", "c", "d", None])
    with pytest.raises(UserError, match=r"a\.parquet, row 5: the value is of type NoneType"):
        read(path, size=1)
    with pytest.raises(UserError, match=r"no column 'body' \(there are: id, text, title\)"):
        read(path, keys=("body",))


ARROW_TEXT = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.string_view(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.binary_view(),
    pyarrow.json_(),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
]


@pytest.mark.parametrize("kind", ARROW_TEXT, ids=str)
def test_text_of_every_arrow_type_is_read(tmp_path: Path, kind: pyarrow.DataType) -> None:
    """polars writes views, pandas large strings and dictionaries, Spark plain bytes, DuckDB JSON."""
    values = [text.encode() for text in TEXTS] if "binary" in str(kind) else TEXTS
    column = pyarrow.array([*values, None], kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": range(len(column))}), tmp_path / "a.parquet")
    bad: list[Bad] = []
    (part,) = cut_into_parts(find_files([str(tmp_path / "a.parquet")]), 10**6)
    assert [record.texts for record in read_records(part, ("text",), bad.append)] == [[text] for text in TEXTS]
    assert [(one.line, one.why) for one in bad] == [(6, "the value is of type NoneType; it must be a string")]


def test_bytes_that_are_no_text_are_bad_rows(tmp_path: Path) -> None:
    column = pyarrow.array([b"fine", b"\xff"]).cast(pyarrow.large_binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: not UTF-8"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "values", [[1], [1.5], [True], [["a"]], [{"a": "b"}], [b"0123456789abcdef"]], ids=lambda values: str(values[0])
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_column_that_is_no_text_is_a_mistake_of_its_own(tmp_path: Path, values: list[object], skip: bool) -> None:
    """Not a bad row, row after row: nothing of the corpus would be left under --on-error skip."""
    kind = pyarrow.uuid() if isinstance(values[0], bytes) else None
    columns = {"text": pyarrow.array(values, kind), "body": ["x"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (part,) = cut_into_parts(find_files([str(tmp_path / "a.parquet")]), 10**6)
    with pytest.raises(UserError, match=r"a\.parquet: column 'text' is of type .*, not text; .*\(there are: body\)"):
        list(read_records(part, ("text",), *([lambda bad: None] if skip else [])))


def test_columns_are_told_apart(tmp_path: Path) -> None:
    """Of two columns of one name neither is taken; a dot in a name is no way into a struct."""
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are called 'text'"):
        read(tmp_path / "a.parquet")
    dotted = pyarrow.table({"a": [{"b": "inner"}], "a.b": ["dotted"]})
    pyarrow.parquet.write_table(dotted, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", keys=("a.b",)) == [["dotted"]]


def test_folders_and_wildcards_are_sorted(tmp_path: Path) -> None:
    for name in ("z.txt", "a/b.txt", "a/a.jsonl", "settings.json", "readme.md", "a/c.jsonl.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [file.path for file in find_files([str(tmp_path)])]
    assert found == [str(tmp_path / name) for name in ("a/a.jsonl", "a/b.txt", "a/c.jsonl.zst", "z.txt")]
    found = [file.path for file in find_files([str(tmp_path / "**" / "*.txt")])]
    assert found == [str(tmp_path / name) for name in ("a/b.txt", "z.txt")]


def names_and_lines(root: Path, *inputs: str) -> tuple[list[str], list[str]]:
    """What is found, relative to `root`, and what is said of the rest."""
    said: list[str] = []
    found = find_files([str(root / name) for name in inputs], said.append)
    return [os.path.relpath(file.path, root) for file in found], said


LEFT_OUT = [
    ".ipynb_checkpoints/a-checkpoint.jsonl",
    ".git/objects/a.txt",
    ".cache/huggingface/download/a.parquet",
    "deep/er/.hidden/a.txt",
    "._a.jsonl",
    ".#a.jsonl",
    ".a.jsonl.tmp-5.jsonl",
    "__MACOSX/a.txt",
    "_temporary/0/part-0.parquet",
    "_delta_log/0.checkpoint.parquet",
]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_hidden_files_are_no_corpus_unless_named(tmp_path: Path, name: str) -> None:
    """What editors, version control, downloads, macOS and Spark leave in folders."""
    names = [name, "a.jsonl", "_books/b.txt", "c.d/e.jsonl", "_SUCCESS", "a.jsonl~", ".DS_Store"]
    for one in names:
        (tmp_path / one).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / one).write_bytes(b"")
    hidden = name.split("/")[0] if not name.startswith("deep") else "deep/er/.hidden"
    taken = ["_books/b.txt", "a.jsonl", "c.d/e.jsonl"]
    found, said = names_and_lines(tmp_path, ".")
    assert (found, len(said)) == (taken, 1)
    assert said[0].startswith(f"left out as hidden: 1 ({tmp_path / hidden});")
    ending = name[name.rindex(".") :]
    (tmp_path / f"plain{ending}").write_bytes(b"")
    matched = names_and_lines(tmp_path, f"**/*{ending}")[0]
    assert f"plain{ending}" in matched
    assert name not in matched
    assert names_and_lines(tmp_path, name) == ([name], [])
    if "/" in name:
        assert names_and_lines(tmp_path, os.path.dirname(name)) == ([name], [])


def test_links_are_walked_once(tmp_path: Path) -> None:
    """Corpora put together from links, and loops of them; the file or folder itself comes before its links."""
    for name in ("corpus/a/x.txt", "corpus/z/y.jsonl", "elsewhere/deep/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    corpus = tmp_path / "corpus"
    (corpus / "more").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere")
    (corpus / "a" / "loop").symlink_to(corpus)
    (corpus / "a" / "first").symlink_to(corpus / "z")
    (tmp_path / "elsewhere" / "back").symlink_to(corpus / "a")
    found, said = names_and_lines(tmp_path, "corpus")
    assert found == ["corpus/a/x.txt", "corpus/again/deep/b.txt", "corpus/z/y.jsonl"]
    assert said == []


def test_a_file_of_several_names_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "m.jsonl").write_text("x")
    (tmp_path / "data" / "a.jsonl").symlink_to("m.jsonl")
    (tmp_path / "data" / "z.jsonl").hardlink_to(tmp_path / "data" / "m.jsonl")
    (tmp_path / "data" / "copy.jsonl").write_text("x")
    expected = ["data/copy.jsonl", "data/m.jsonl"]
    found, (line,) = names_and_lines(tmp_path, "data")
    assert found == expected
    assert line.startswith("left out as other names of the same files: 2 (")
    assert f"{tmp_path}/data/a.jsonl is {tmp_path}/data/m.jsonl" in line
    for inputs in (("data", "data/m.jsonl"), ("data/*.jsonl", "data"), ("dat*",)):
        assert names_and_lines(tmp_path, *inputs)[0] == expected
    assert names_and_lines(tmp_path, "data/a.jsonl") == (["data/a.jsonl"], [])


def test_a_shard_in_two_forms_is_told(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.jsonl.gz", "y.txt", "y.md", "z.jsonl", "deep/z.jsonl.zst", "w.parquet", "w.2.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, (line,) = names_and_lines(tmp_path, ".")
    assert len(found) == 7
    assert line.startswith(f"{tmp_path}/x.jsonl and {tmp_path}/x.jsonl.gz may contain the same text")


def test_what_a_walk_cannot_look_at_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than a corpus that is smaller than it looks."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("x")
    for target in ("/nowhere/b.txt", "b.txt"):
        (tmp_path / "b.txt").symlink_to(target)
        with pytest.raises(UserError, match=r"b\.txt is not a file, or is a broken link"):
            find_files([str(tmp_path)])
        (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(UserError, match=r"c\.txt is not a file"):
        find_files([str(tmp_path)])
    (tmp_path / "c.txt").unlink()
    scandir = os.scandir

    def closed(folder: Path) -> object:
        if folder.name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"the folder .*deep cannot be read \(Permission denied\)"):
        find_files([str(tmp_path)])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 60), max_size=12), min_size=1, max_size=4),
    part=st.integers(1, 200),
    final=st.booleans(),
)
def test_every_line_is_in_one_part_whatever_the_cuts(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], part: int, final: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    expected, where = [], []
    for number, file in enumerate(sizes):
        texts = [f"{number}.{place}." + "x" * size for place, size in enumerate(file)]
        content = lines(texts)
        (folder / f"{number}.jsonl").write_bytes(content if final else content.rstrip(b"\n"))
        expected += [[text] for text in texts]
        where += [(f"{number}.jsonl", place) for place in range(1, len(file) + 1)]
    parts = cut_into_parts(find_files([str(folder)]), part)
    records = [record for part in parts for record in read_records(part, ("text",))]
    assert [record.texts for record in records] == expected
    assert [(Path(r.piece.source.path).name, line_number(r.piece, r.line)) for r in records] == where


def test_parts_grow_with_the_corpus_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for size, expected in ((10, 8 << 20), (8 << 30, 32 << 20), (8 << 40, 64 << 20)):
        with path.open("wb") as file:
            file.truncate(size)  # sparse
        assert part_bytes(find_files([str(path)])) == expected
    assert len(cut_into_parts(find_files([str(path)]), 64 << 20)) == 131072


BAD = [
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
    (b'{"text": "a", "text" : "b"}', "key 'text' occurs twice; keep one"),
    (b'{"text": "a", "x": NaN, "te\\u0078t": "b"}', "key 'text' occurs twice; keep one"),
    (b'{"\\ud800": "a"}', r"no key 'text' .there are: .ud800."),
]


@pytest.mark.parametrize(("line", "told"), BAD)
@pytest.mark.parametrize("size", [5, 10**6])
def test_bad_lines_are_told_with_file_and_number(tmp_path: Path, line: bytes, told: str, size: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines(["fine"]) + b"\n" + line + b"\n" + lines(["fine"]))
    with pytest.raises(UserError, match=told) as error:
        read(path, size=size)
    assert f"{path}, line 3:" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_lines_can_be_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(lines([str(number)]) + line + b"\n" for number, (line, _) in enumerate(BAD)))
    bad: list[Bad] = []
    records = [
        r for part in cut_into_parts(find_files([str(path)]), 40) for r in read_records(part, ["text"], bad.append)
    ]
    assert [record.texts for record in records] == [[str(number)] for number in range(len(BAD))]
    assert [line_number(one.piece, one.line) for one in bad] == list(range(2, 2 * len(BAD) + 1, 2))
    assert [one.data for one in bad] == [line for line, _ in BAD]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_broken_packing_is_told(tmp_path: Path, ending: str) -> None:
    """Cut anywhere, altered anywhere, or not packed at all: never a shorter corpus."""
    texts = [str(number) * 50 for number in range(3000)]
    path = tmp_path / f"whole{ending}"
    if ending == ".parquet":
        only = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(only, path, write_page_checksum=True, use_dictionary=False, compression="none")
    else:
        checked = zstandard.ZstdCompressor(write_checksum=True).compress
        path.write_bytes((gzip.compress if ending == ".jsonl.gz" else checked)(lines(texts)))
    assert len(read(path, size=10**9)) == 3000
    whole = path.read_bytes()
    middle = len(whole) // 3
    broken = {
        "cut": whole[: -len(whole) // 2],
        "tail": whole[:-4],
        "none": b"not packed at all",
        "flip": whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 20]) + whole[middle + 20 :],
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}(, line \d+)?: (broken|not)") as error:
            read(path, size=10**9)
        assert "\n" not in str(error.value)


def test_a_file_that_changes_under_way_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x"]))
    parts = cut_into_parts(find_files([str(path)]), 100)
    path.write_bytes(lines(["x", "y"]))
    with pytest.raises(UserError, match="changed while it was being read"):
        list(read_records(parts[0], ["text"]))
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        list(read_records(parts[0], ["text"]))


def test_absent_and_unknown_inputs_are_told(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"")
    (tmp_path / "table.parquet.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, told in {
        "absent.jsonl": "does not exist",
        "*.jsonl": "no file matches",
        "table.csv": "unknown kind",
        "table.parquet.gz": "unknown kind",
        "empty": "contains none of",
    }.items():
        with pytest.raises(UserError, match=told) as error:
            find_files([str(tmp_path / name)])
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(UserError, match="no file given"):
        find_files([])
