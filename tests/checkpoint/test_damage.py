"""A damaged checkpoint and a full disk are one line each, and what was whole before is whole after."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalong.checkpoint.folder import META, SEAL, find_checkpoint, read_meta, verify
from megalong.errors import UserError
from tests.llama import make_llama
from tests.ranks import megalong


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = megalong("import-hf", "--hf", make_llama(folder / "hf"), "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def cut(checkpoint: Path, name: str) -> None:
    os.truncate(checkpoint / name, 40)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda step: cut(step, ".metadata"), r"\.metadata has 40 bytes instead of \d+"),
        (lambda step: cut(step, "__0_0.distcp"), r"__0_0\.distcp has 40 bytes instead of \d+"),
        (lambda step: (step / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
        (lambda step: (step / "metadata.json").unlink(), r"metadata\.json is missing"),
        (lambda step: (step / META).unlink(), "no megalong.json"),
        (lambda step: (step / META).write_bytes(b"\xff\xfe"), "megalong.json is damaged"),
        (lambda step: (step / META).write_text("[]"), "megalong.json is damaged"),
    ],
)
def test_damage_is_told_before_anything_is_loaded(
    damage: Callable[[Path], object], told: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    step = find_checkpoint(tmp_path / "run")
    assert read_meta(step).files.keys() >= {".metadata", "__0_0.distcp", "metadata.json"}
    damage(step)
    with pytest.raises(UserError, match=f"{told}.*delete that folder") as error:
        read_meta(find_checkpoint(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_damage_within_a_file_is_one_line_too(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shard = find_checkpoint(tmp_path / "run") / "__0_0.distcp"
    shard.write_bytes(b"\x93" * shard.stat().st_size)
    done = megalong("export-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {shard.parent} is damaged" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_one_from_before_checksums_is_a_note_and_its_damage_an_error(whole: Path, tmp_path: Path) -> None:
    step = shutil.copytree(find_checkpoint(whole), tmp_path / "step")
    values = json.loads((step / META).read_text())
    del values["checksums"]
    (step / META).write_text(json.dumps(values))
    (step / SEAL).unlink()
    done = megalong("checkpoint", "verify", step)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no checksums (written by an earlier version)" in done.stdout
    cut(step, "__0_0.distcp")
    done = megalong("checkpoint", "verify", step)
    assert (done.returncode, done.stdout) == (2, "")
    assert "__0_0.distcp has 40 bytes" in done.stderr


def no_file_beyond_1_kilobyte() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, 1 << 10))


def no_file_beyond_100_kilobytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))


@pytest.mark.parametrize("limit", ["no_file_beyond_1_kilobyte", "no_file_beyond_100_kilobytes"])
def test_a_full_disk_is_one_line_and_leaves_nothing(limit: str, whole: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit, which the writers meet as they would meet a full disk."""
    here = "tests.checkpoint.test_damage"
    done = megalong("import-hf", "--hf", whole.parent / "hf", "--output", tmp_path / "new", before=f"{here}:{limit}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("new/checkpoints/*"))


def test_every_flipped_byte_cut_and_missing_file_is_found(whole: Path, tmp_path: Path) -> None:
    """Five trials per file: one byte changed anywhere; then a cut, then the file gone."""
    step = shutil.copytree(find_checkpoint(whole), tmp_path / "step")
    assert verify(step) == []
    generator = random.Random(1)
    for path in sorted(one for one in step.rglob("*") if one.is_file()):
        content = path.read_bytes()
        # Every byte of the seal, of which the line's end is one that another white space might stand for.
        places = range(len(content)) if path.name == SEAL else [generator.randrange(len(content)) for _ in range(5)]
        for at in places:
            changed = 9 ^ 10 ^ content[at] if path.name == SEAL else content[at] ^ generator.randrange(1, 256)
            path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
            assert len(verify(step)) == 1, (path, at, changed)
        path.write_bytes(content[: len(content) // 2])
        assert len(verify(step)) == 1, path
        path.unlink()
        assert len(verify(step)) == 1, path
        path.write_bytes(content)
    assert verify(step) == []


def test_garbage_of_the_same_size_is_refused_by_name_and_by_verify(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    # The one pickle that every version of Megatron-Core writes.
    pickled = find_checkpoint(tmp_path / "run") / ".metadata"
    pickled.write_bytes(b"\x93" * pickled.stat().st_size)
    for command in (
        ["export-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out"],
        ["checkpoint", "verify", tmp_path / "run"],
    ):
        done = megalong(*command)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert f"{pickled.parent} is damaged: .metadata has checksum" in done.stderr.splitlines()[-1]
