"""gigatoken's ids against those of `tokenizers`, for every kind of text, and the ways out where they differ."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megalong.data.corpus import encoder as encoder_module
from megalong.data.corpus.encoder import BatchEncoder, needs_guard, reference
from megalong.data.corpus.preprocess import preprocess
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError
from tests.data.conftest import PROSE

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
KINDS = ["gpt2", "llama3"]
AROUND = ["{c}", "a{c}a1{c}1 {c} .{c}.", "{c}{c}\n{c} \n {c}'s", "'{c}'l{c}'{c}e x\r{c}\t{c}"]
HARD = [
    "", "a", "\0", "\0\0a\0", "\r\n\r\n \r\n", " \n \t\n", "<s>", "a<s>b</s>", "<|x|>", "use <tool> here<tool>",
    "\ufeff", "naïve 数学 한국어 🙂👨‍👩‍👧🇩🇪", "e\u0301\u0308", "\U0010ffff\ufffe",
    "\u088f \n \u088f's \U000323b0x", "'ſ 'S'LL'ſ", "\u0130I\u0131",
    " " * 300, "9" * 50, "\u2028\u2029\u0085\u00a0\u3000x", "ab" * 5000,
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ways to split text into words; `<s>` and `</s>` are special, `<tool>` is not."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=request.param == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=request.param == "gpt2")
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = byte_level if request.param == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*PROSE, "naïve 数学 🙂 don't it's we'll <s> 123 2026" * 500], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, lstrip=True)])
    path = tmp_path_factory.mktemp(request.param)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def expected(folder: Path, texts: list[str]) -> list[list[int]]:
    """`tokenizers` set up independently: nothing added, text never special."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def encoded(folder: Path, texts: list[str]) -> list[list[int]]:
    encoder = BatchEncoder(TextTokenizer(folder))
    assert encoder.fallback is None
    ids, lengths = encoder.encode(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_hard_texts(folder: Path) -> None:
    assert encoded(folder, HARD) == expected(folder, HARD)
    assert [encoded(folder, [text])[0] for text in HARD] == expected(folder, HARD)


def test_long_and_short_batches(folder: Path) -> None:
    """Short texts go over in one call, long ones each on its own."""
    short = [line for text in PROSE[:30] for line in text.splitlines()]
    assert encoded(folder, short) == expected(folder, short)
    assert encoded(folder, PROSE[:40]) == expected(folder, PROSE[:40])
    ids, lengths = BatchEncoder(TextTokenizer(folder)).encode([])
    assert (len(ids), len(lengths)) == (0, 0)


CHARACTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t'sdmtlvre<>10.é数🙂"))


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(CHARACTERS, max_size=60), min_size=1, max_size=6))
def test_any_text(folder: Path, texts: list[str]) -> None:
    assert encoded(folder, texts) == expected(folder, texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "around", ["{c}", "a{c}a1{c}1 {c} .{c}.", "{c}{c}\n{c} \n {c}'s", "'{c}'l{c}'{c}e x\r{c}\t{c}"]
)
def test_every_character_there_is(folder: Path, around: str) -> None:
    points = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    encoder = BatchEncoder(TextTokenizer(folder))
    for start in range(0, len(points), 40_000):
        texts = [around.format(c=c) for c in points[start : start + 40_000] if unicodedata.category(c) != "Cn"]
        texts += [around.format(c=c) for c in points[start : start + 40_000 : 97] if unicodedata.category(c) == "Cn"]
        ids, lengths = encoder.encode(texts)
        for text, part, wanted in zip(
            texts, np.split(ids, np.cumsum(lengths)[:-1]), expected(folder, texts), strict=False
        ):
            assert part.tolist() == wanted, ascii(text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_document_of_fifty_megabytes(folder: Path) -> None:
    text = "".join(random.Random(0).choices(PROSE, k=50_000_000 // (sum(map(len, PROSE)) // len(PROSE))))
    assert len(text) > 40_000_000
    assert encoded(folder, [text, "short"]) == expected(folder, [text, "short"])


@pytest.fixture(scope="module")
def composing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer with NFC and without `<tool>`, which would leave all to `tokenizers`."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    path = tmp_path_factory.mktemp("nfc")
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "around", ["q\u0312{c}", "q{c}\u0312", "\u05d0{c}\u0316\u0301 a{c}e", "{c}\u0301", "\U00011347{c}"]
)
def test_marks_of_any_year_are_normalized_as_tokenizers_does(composing: Path, around: str) -> None:
    """Whatever is combined, composed or decomposed: marks, and letters that are written in two ways."""
    points = [chr(point) for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    texts = [around.format(c=c) for c in points if unicodedata.category(c)[0] == "M" or unicodedata.decomposition(c)]
    assert len(texts) > 5000
    assert encoded(composing, texts) == expected(composing, texts)


def test_a_new_mark_behind_a_plain_document(composing: Path, tmp_path: Path) -> None:
    texts = ["plain", "q\u0312\u1dfa"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (prefix,) = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), str(composing))
    ids = np.fromfile(f"{prefix}.bin", np.uint16).tolist()
    assert ids == [id for text in expected(composing, texts) for id in text]


def test_only_what_is_new_to_normalization_is_guarded() -> None:
    for text in ("é e\u0301 q\u0323\u0307 \uac00 \u1100\u1161 \u0958", "数学 한국어 ไทย हिन्दी 🙂 \U0001f9ff"):
        assert not needs_guard(text, True)
    for text in ("q\u0312\u1dfa", "\U0001133e", "\U00011347", "\U0001e900"):  # moved, composed twice, lowered
        assert needs_guard(text, True)
        assert not needs_guard(text, False)


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
def test_whether_a_tokenizer_normalizes_is_read_from_the_head(
    composing: Path, tmp_path: Path, normalizer: object
) -> None:
    content = json.loads((composing / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    for text in (json.dumps(content), json.dumps(dict(reversed(content.items())))):  # as written; vocabulary first
        (tmp_path / "tokenizer.json").write_text(text)
        assert TextTokenizer(tmp_path).normalizes == (normalizer is not None)


def test_unassigned_characters_are_known() -> None:
    for point in [*range(0x3100), 0x10FFFF, 0xFFFE, 0x1F642, 0x323AF, 0xE000, *range(0x16E00, 0x17000)]:
        assert needs_guard("é" + chr(point) + "x", False) == (unicodedata.category(chr(point)) == "Cn"), hex(point)
    assert not needs_guard("", True)


def test_no_text_with_an_unknown_character_reaches_gigatoken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = BatchEncoder(TextTokenizer(folder))
    seen: list[bytes] = []

    class Fast:
        def encode(self, data: bytes) -> np.ndarray:
            seen.append(data)
            return np.zeros(1, np.uint32)

    monkeypatch.setattr(encoder, "_fast", Fast())
    encoder.encode(["plain", "with <tool>", "\U0010ffff", "é"])
    assert seen == [b"plain", "é".encode()]


def lower_case(folder: Path, target: Path) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(target / "tokenizer.json"))
    return target


def word_piece(folder: Path, target: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(target / "tokenizer.json"))
    return target


@pytest.mark.parametrize("make", [lower_case, word_piece])
def test_what_gigatoken_cannot_load_is_left_to_tokenizers_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object
) -> None:
    make(folder, tmp_path)  # type: ignore[operator]
    (tmp_path / "a.jsonl").write_text('{"text": "one two One"}\n')
    (prefix,) = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), str(tmp_path))
    assert "gigatoken cannot load" in capsys.readouterr().err
    dtype = np.uint16
    assert np.fromfile(f"{prefix}.bin", dtype).tolist() == expected(tmp_path, ["one two One"])[0]


def test_encoders_that_differ_are_refused_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """gigatoken is given a tokenizer whose first merges are missing."""
    strip = encoder_module._without_added_tokens

    def wrong(content: bytes) -> bytes:
        changed = json.loads(strip(content))
        del changed["model"]["merges"][:5]
        changed["model"]["ignore_merges"] = False
        return json.dumps(changed).encode()

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": PROSE[0]}) + "\n")
    words = {"inputs": [str(tmp_path / "a.jsonl")], "output_prefix": str(tmp_path / "out"), "tokenizer": str(folder)}
    with monkeypatch.context() as patch:
        patch.setattr(encoder_module, "_without_added_tokens", wrong)
        with pytest.raises(UserError, match=r"gigatoken and `tokenizers` disagree on .*; use --encoder tokenizers"):
            preprocess(**words)  # type: ignore[arg-type]
        assert not list(tmp_path.glob("out*"))
        preprocess(**words, encoder="tokenizers")  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    slow = (tmp_path / "out_text_document.bin").read_bytes()
    preprocess(**words)  # type: ignore[arg-type]
    assert (tmp_path / "out_text_document.bin").read_bytes() == slow


def test_vocabulary_sizes_agree(folder: Path) -> None:
    tokenizer = TextTokenizer(folder)
    assert BatchEncoder(tokenizer).vocabulary_size == tokenizer.vocabulary_size == 3001
    assert BatchEncoder(tokenizer, "tokenizers").vocabulary_size == 3001


def test_the_sample_starts_with_probes(folder: Path) -> None:
    told = reference(TextTokenizer(folder), ["x" * 10**6])
    assert told.texts[-1] == "x" * encoder_module.SAMPLE_CHARACTERS
    assert told.ids == expected(folder, told.texts)
