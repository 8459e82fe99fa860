"""Token streams against `tokenizers` itself, set up independently."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError
from tests.data.conftest import PROSE

TEXTS = ["", "a", "naïve 数学 🙂 é", "nul \0 \0", "a\r\nb\n\n", " ", "<tool> use", "﻿mark", *PROSE[:5]]


def test_ids_are_those_of_tokenizers_without_additions(tokenizer_folder: Path) -> None:
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    reference.no_truncation()
    expected = [reference.encode(text, add_special_tokens=False).ids for text in TEXTS]
    ours = TextTokenizer(tokenizer_folder)
    assert ours.encode_batch(TEXTS) == expected
    assert [ours.encode(text) for text in TEXTS] == expected
    assert [ours.decode(ids) for ids in expected] == TEXTS
    assert max(len(ids) for ids in expected) > 16, "truncation is on in the file"


def test_text_never_becomes_a_special_token(tokenizer_folder: Path) -> None:
    ours = TextTokenizer(tokenizer_folder)
    text = "a <s> in </s>the<s>text"
    ids = ours.encode(text)
    assert not {0, ours.eos_id} & set(ids)
    assert ours.decode(ids) == text
    assert ours.encode_batch([text]) == [ids]
    assert ours.encode("<s>") == [id for piece in "<s>" for id in ours.encode(piece)]


def test_special_ids_size_and_fingerprint(tokenizer_folder: Path) -> None:
    ours = TextTokenizer(tokenizer_folder)
    assert (ours.eos_id, ours.added_id("<tool>"), ours.added_id("the")) == (1, 600, None)
    assert (ours.vocabulary_size, ours.name) == (601, "small")
    assert TextTokenizer(tokenizer_folder / "tokenizer.json").sha256 == ours.sha256


@pytest.mark.parametrize(
    ("file", "content", "eos"),
    [
        ("special_tokens_map.json", {"eos_token": "</s>"}, 1),
        ("generation_config.json", {"eos_token_id": [1, 0]}, 1),
        ("config.json", {"eos_token_id": 1}, 1),
        ("config.json", {"eos_token_id": None}, None),
        ("tokenizer_config.json", {"eos_token": "<absent>"}, None),
    ],
)
def test_the_end_token_is_found_wherever_it_is_named(
    tokenizer_folder: Path, tmp_path: Path, file: str, content: dict[str, object], eos: int | None
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    assert TextTokenizer(tmp_path).eos_id == eos


def test_absent_and_unreadable_tokenizers_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        TextTokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"contains no tokenizer\.json"):
        TextTokenizer(tmp_path)
    for content in ("", "{", '{"version": "1.0"}', "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="not readable") as error:
            TextTokenizer(tmp_path)
        assert "\n" not in str(error.value)
