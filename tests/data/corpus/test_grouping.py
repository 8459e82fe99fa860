"""Files of a repository as one document: against a plain dictionary in memory, whatever the cuts and shards."""

import json
import random
import zlib
from pathlib import Path

import pytest

from megalong.data.corpus import grouping
from megalong.data.corpus.preprocess import preprocess
from megalong.data.indexed import IndexedDataset
from megalong.data.merge import merge
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError
from tests.data.conftest import PROSE

BUCKETS = 7


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, many buckets, many runs a part."""
    monkeypatch.setattr("megalong.data.corpus.preprocess.part_bytes", lambda files: 30_000)
    monkeypatch.setattr("megalong.data.corpus.preprocess.bucket_count", lambda files: BUCKETS)
    monkeypatch.setattr(grouping, "RUN_BYTES", 9_000)


@pytest.fixture
def code(tmp_path: Path) -> list[dict[str, str]]:
    """Files of thirty repositories in random order, two of them of the same path."""
    generator = random.Random(5)
    records = [
        {"repo": f"répo/{generator.randrange(30)}", "path": f"src/{generator.randrange(1000)}.py", "text": text[:900]}
        for text in PROSE * 2
    ]
    records[7] = {**records[3], "text": "the second of one path"}
    with (tmp_path / "code.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return records


def expected(records: list[dict[str, str]]) -> list[str]:
    groups: dict[str, list[dict[str, str]]] = {}
    for record in records:
        groups.setdefault(record["repo"], []).append(record)
    order = sorted(groups, key=lambda repo: (zlib.crc32(repo.encode()) % BUCKETS, repo))
    return ["\n".join(r["text"] for r in sorted(groups[repo], key=lambda r: r["path"])) for repo in order]


def run(folder: Path, tokenizer: Path, name: str, **more: object) -> str:
    words = {"separator": "<s>", "group_by": "repo", "workers": 2} | more
    return preprocess([str(folder / "code.jsonl")], str(folder / name), str(tokenizer), **words)[0]  # type: ignore[arg-type]


def test_documents_are_repositories_in_order_of_their_paths(
    tmp_path: Path, tokenizer_folder: Path, code: list[dict[str, str]]
) -> None:
    dataset = IndexedDataset(run(tmp_path, tokenizer_folder, "out"))
    tokenizer = TextTokenizer(tokenizer_folder)
    texts = expected(code)
    assert dataset.num_documents == len(texts)
    for number, text in enumerate(texts):
        assert dataset.document(number).tolist() == [*tokenizer.encode(text), 0]
    assert dataset.sidecar is not None
    assert dataset.sidecar["grouped_by"] == "repo"
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.usefixtures("code")
def test_shards_merge_to_the_whole(tmp_path: Path, tokenizer_folder: Path) -> None:
    whole = run(tmp_path, tokenizer_folder, "out", workers=3)
    shards = [run(tmp_path, tokenizer_folder, "out", shard=f"{place}/3") for place in (1, 2, 3)]
    merged = merge(shards, str(tmp_path / "merged"))
    for ending in (".bin", ".idx", ".json"):
        assert Path(f"{merged}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()


@pytest.mark.usefixtures("code")
def test_bad_records_are_told_and_gathered(tmp_path: Path, tokenizer_folder: Path) -> None:
    with (tmp_path / "code.jsonl").open("a") as file:
        file.write('{"repo": 5, "path": "x", "text": "x"}\n')
    last = 2 * len(PROSE) + 1
    with pytest.raises(UserError, match=rf"line {last}: the value of 'repo' is of type int"):
        run(tmp_path, tokenizer_folder, "out")
    run(tmp_path, tokenizer_folder, "out", on_error="skip")
    (entry,) = (json.loads(line) for line in (tmp_path / "out_rejected.jsonl").read_text().splitlines())
    assert entry["line"] == last
