"""Folders that cannot be written to are refused before anything is written, and the folder itself is not made."""

import os
from pathlib import Path

import pytest

from megalong.errors import UserError
from megalong.runtime.folders import refuse_unwritable, with_default_mode


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "new" / "run", "run.dir")
    refuse_unwritable(tmp_path, "run.dir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_is_in_the_way(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"^run\.dir {tmp_path}/file.*: {tmp_path}/file is a file"):
        refuse_unwritable(tmp_path / "file" / below, "run.dir")


def test_a_folder_of_someone_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, so the answer is given
    with pytest.raises(UserError, match=f"--output {tmp_path}/new: {tmp_path} is not writable"):
        refuse_unwritable(tmp_path / "new", "--output")


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_file_gets_the_mode_of_a_new_one(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "new").touch()
        (tmp_path / "mine").touch(0o600)
        with_default_mode(tmp_path / "mine")
    finally:
        os.umask(before)
    assert (tmp_path / "mine").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]
