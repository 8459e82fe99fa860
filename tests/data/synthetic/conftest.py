"""A dataset of prose with `<s>` between its documents, and one whose separator stands before them."""

import json
from pathlib import Path

import pytest

from megalong.data.corpus.preprocess import preprocess
from tests.data.conftest import PROSE


@pytest.fixture(scope="session")
def haystacks(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("haystacks")
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE[:40]))
    for position in ("between", "before"):
        preprocess(
            [str(source)],
            str(folder / position),
            str(tokenizer_folder),
            separator="<s>",
            separator_position=position,
            workers=1,
        )
    return {position: folder / f"{position}_text_document" for position in ("between", "before")}
