"""A pickle that would run code is refused by name, wherever it is planted; nothing of it is run."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.checkpoint.checksum import checksum, covered
from megalong.checkpoint.data_only import METADATA, refusal
from megalong.checkpoint.folder import META, SEAL, file_sizes, find_checkpoint, read_meta, verify, write_meta
from tests.llama import make_llama
from tests.ranks import megalong


class Planted:
    """Makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = megalong("import-hf", "--hf", make_llama(folder / "hf"), "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def in_metadata(checkpoint: Path, planted: Planted) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    metadata.planner_data = planted
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def in_metadata_by_stack(checkpoint: Path, planted: Planted) -> None:
    """Protocol 4 takes names from the stack."""
    (checkpoint / METADATA).write_bytes(pickle.dumps(planted, protocol=4))


def in_an_object(checkpoint: Path, planted: Planted) -> None:
    """An object's bytes are replaced by others in a file of their own."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    index = next(one for one in metadata.storage_data if "_extra_state" in one.fqn)
    blob = io.BytesIO()
    torch.save({"state": planted}, blob)
    (checkpoint / "__9_0.distcp").write_bytes(blob.getvalue())
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(blob.getvalue())
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, planted: Planted) -> None:
    torch.save({"planted": planted}, checkpoint / "common.pt")


@pytest.mark.parametrize("plant", [in_metadata, in_metadata_by_stack, in_an_object, in_common])
def test_code_is_refused_by_name_and_not_run(
    plant: Callable[[Path, Planted], None], whole: Path, tmp_path: Path
) -> None:
    """Sizes and checksums are made to fit, as one who means harm would."""
    shutil.copytree(whole, tmp_path / "run")
    step = find_checkpoint(tmp_path / "run")
    assert refusal(step) is None
    made = tmp_path / "made"
    plant(step, Planted(made))
    sums = {name: checksum(step / name) for name in covered(step, (META, SEAL))}
    files = {name: size for name, size in file_sizes(step).items() if name != SEAL}
    meta = read_meta_unchecked(step).model_copy(update={"files": files, "checksums": sums})
    write_meta(step, meta)
    assert verify(step) == []
    assert read_meta(step) == meta
    done = megalong("export-hf", "--checkpoint", step, "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"is refused: .*(posix|os)\.open.*would run code", done.stderr.splitlines()[-1])
    assert not made.exists()
    assert not (tmp_path / "out").exists()


def read_meta_unchecked(step: Path) -> Any:
    from megalong.checkpoint.folder import Meta

    return Meta.model_validate_json((step / META).read_text())


def test_a_path_out_of_the_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    step = shutil.copytree(find_checkpoint(whole), tmp_path / "step")
    metadata = pickle.loads((step / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (step / METADATA).write_bytes(pickle.dumps(metadata))
    told = refusal(step)
    assert told is not None
    assert "../elsewhere" in told
