"""Folders that cannot be written to are refused before anything is written, and the folder itself is not made."""

import os
from pathlib import Path

import pytest

from megalong.errors import UserError
from megalong.runtime.folders import refuse_unwritable


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
