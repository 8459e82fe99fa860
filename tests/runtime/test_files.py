"""Messages about files that cannot be read say why: permission is permission, a folder a folder, a link a link."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalong.checkpoint.folder import META, DamagedError, Meta, read_meta
from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError
from megalong.hf.config import read_architecture
from megalong.runtime.files import refuse_unreadable
from megalong.sft.words import open_tokenizer
from tests.llama import make_llama

DENIED = r": this user may not read it \(permission denied\)"


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a file of this name be unreadable; root, as which tests may run, could read anything."""
    opened = Path.open

    def refuse(name: str) -> None:
        def open_or_not(path: Path, *how: Any, **more: Any) -> Any:
            if path.name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return opened(path, *how, **more)

        monkeypatch.setattr(Path, "open", open_or_not)

    return refuse


def dataset(prefix: Path) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(9))
        writer.finish()
    prefix.with_suffix(".json").write_text('{"format": 1, "documents": 1, "tokens": 9}')
    IndexedDataset(prefix)
    return prefix


@pytest.mark.parametrize("name", ["d.bin", "d.idx", "d.json"])
def test_a_dataset_that_may_not_be_read(name: str, tmp_path: Path, deny: Callable[[str], None]) -> None:
    prefix = dataset(tmp_path / "d")
    deny(name)
    with pytest.raises(UserError, match=f"{name}{DENIED}") as error:
        IndexedDataset(prefix)
    assert "again" not in str(error.value)


@pytest.mark.parametrize("name", ["d.bin", "d.idx"])
def test_a_folder_or_a_broken_link_in_place_of_a_dataset(name: str, tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "d")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: a folder, not a file; copy it again, or write it again"):
        IndexedDataset(prefix)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: a link to {tmp_path}/elsewhere, which is not there; copy it again"):
        IndexedDataset(prefix)


def test_a_model_and_a_tokenizer(tmp_path: Path, deny: Callable[[str], None]) -> None:
    folder = make_llama(tmp_path / "hf")
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"^--tokenizer: .*tokenizer\.json: a folder, not a file; fetch it again"):
        TextTokenizer(folder)
    (folder / "tokenizer.json").rmdir()
    (folder / "tokenizer.json").write_text("{}")
    deny("tokenizer.json")
    with pytest.raises(UserError, match=f"^--tokenizer: .*{DENIED}"):
        TextTokenizer(folder)
    with pytest.raises(UserError, match=f"^sft.tokenizer: .*{DENIED}"):
        open_tokenizer(folder, "sft.tokenizer")
    deny("config.json")
    with pytest.raises(UserError, match=f"config.json{DENIED}"):
        read_architecture(folder)
    with pytest.raises(UserError, match=r"/none: no such file; download it again$"):
        refuse_unreadable(tmp_path / "none")


def test_a_checkpoint_that_may_not_be_read_is_not_set_aside_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = read_architecture(make_llama(tmp_path / "hf"))
    (tmp_path / "__0_0.distcp").write_bytes(b"tensors")
    meta = Meta(step=1, architecture=architecture, files={"__0_0.distcp": 7})
    (tmp_path / META).write_text(meta.model_dump_json())
    assert read_meta(tmp_path).step == 1
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "__0_0.distcp")
    with pytest.raises(UserError, match=f"__0_0.distcp{DENIED}") as error:
        read_meta(tmp_path)
    assert not isinstance(error.value, DamagedError)
