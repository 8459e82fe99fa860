"""What counts as the same tokenizer: whatever gives the ids that `tokenizers` gives, however its file is spelled."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalong.data.corpus.preprocess import preprocess
from megalong.data.indexed import IndexedDataset
from megalong.data.merge import merge
from megalong.data.token_ids import ids_fingerprint, same_ids
from megalong.data.tokenizer_check import DatasetTokenizer, check_tokenizers
from megalong.errors import UserError

PROSE = list(pydoc_data.topics.topics.values())[:8]
TEXTS = [*PROSE, "  12345 <tool> Ünïcode\u0301\n\n\tdon't", "<s> a  b"]
GPT4 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+"


def byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def train(model: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    common = {"vocab_size": 500, "special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **common)
    if isinstance(model, models.BPE):
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    tokenizer.train_from_iterator(PROSE, trainer)
    return tokenizer


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(GPT4), behavior="isolated")
    inner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return train(models.BPE(ignore_merges=True), pre_tokenizers.Sequence([split, inner]))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: train(models.BPE(), byte_level()),
    "llama 3": llama3,
    "llama 2": lambda: train(models.BPE(byte_fallback=True, unk_token="<unk>"), pre_tokenizers.Metaspace()),
    "unigram": lambda: train(models.Unigram(), pre_tokenizers.Metaspace(), normalizers.NFKC()),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kind")
    KINDS[request.param]().save(str(folder / "tokenizer.json"))
    return folder


def content(folder: Path) -> bytes:
    return (folder / "tokenizer.json").read_bytes()


def ids(content: bytes) -> list[list[int]]:
    """As datasets are made: special tokens are plain text, nothing is cut."""
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_what_transformers_saves_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    """With a chat template, other names of special tokens, more of them, truncation, padding and a decoder."""
    named = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    named.chat_template = "{{ messages }}"
    named.save_pretrained(tmp_path / "named")
    again = AutoTokenizer.from_pretrained(tmp_path / "named")
    again("a b c d", truncation=True, max_length=2, padding="max_length")
    again.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    again.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse()])
    again.save_pretrained(tmp_path / "again")
    for other in ("named", "again"):
        assert content(tmp_path / other) != content(folder)
        assert ids(content(tmp_path / other)) == ids(content(folder))
        assert ids_fingerprint(content(tmp_path / other)) == ids_fingerprint(content(folder))


def test_spellings_of_other_versions_are_the_same(folder: Path) -> None:
    """Merges as one text, no type of the model, unset fields left out; and one line instead of many."""
    whole = json.loads(content(folder))
    model = whole["model"]
    if "merges" in model:
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
        del model["type"]
    for name in [name for name, value in model.items() if value is None or value is False]:
        del model[name]
    older = json.dumps(whole).encode()
    assert ids(older) == ids(content(folder))
    assert ids_fingerprint(older) == ids_fingerprint(content(folder))


def edited(content: bytes, edit: str) -> bytes:
    """The tokenizer with one thing changed that changes ids of TEXTS."""
    whole = json.loads(content)
    vocab = whole["model"]["vocab"]
    if edit == "two ids":
        if isinstance(vocab, list):
            vocab[-1][0], vocab[-2][0] = vocab[-2][0], vocab[-1][0]
        else:
            first, second = list(vocab)[-1], list(vocab)[-2]
            vocab[first], vocab[second] = vocab[second], vocab[first]
    elif edit == "lower case":
        whole["normalizer"] = {"type": "Lowercase"}
    elif edit == "digits":
        digits = {"type": "Digits", "individual_digits": True}
        whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, whole["pre_tokenizer"]]}
    else:
        matched = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        whole["added_tokens"].append({"id": len(vocab), "content": "<tool>", **matched})
    return json.dumps(whole).encode()


@pytest.mark.parametrize("edit", ["two ids", "lower case", "digits", "an added token"])
def test_what_changes_ids_is_another(folder: Path, edit: str) -> None:
    other = edited(content(folder), edit)
    if edit == "two ids" or ids(other) != ids(content(folder)):
        assert ids_fingerprint(other) != ids_fingerprint(content(folder))
    else:
        assert edit == "digits"  # which Llama 3's own pattern has apart already, or one that no text shows


def test_a_file_that_is_no_tokenizer_has_no_fingerprint() -> None:
    for broken in (b"", b"{}", b"[1]", b'{"model": {"type": "BPE"}}', b'{"model": 3}'):
        assert ids_fingerprint(broken) is None


def described(folder: Path, **more: str) -> dict[str, str]:
    return {"name": "x", "path": str(folder), "sha256": hashlib.sha256(content(folder)).hexdigest(), **more}


def test_an_earlier_sidecar_is_compared_while_its_tokenizer_is_there(tmp_path: Path) -> None:
    first = llama3()
    for name, tokenizer in {"a": first, "c": KINDS["byte level"]()}.items():
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    first.enable_truncation(16)
    (tmp_path / "b").mkdir()
    first.save(str(tmp_path / "b" / "tokenizer.json"))
    a, b, c = (described(tmp_path / name) for name in "abc")
    assert (same_ids(a, b), same_ids(a, c), same_ids(a, a | {"path": "gone"})) == (True, False, True)
    assert same_ids(a, b | {"path": "gone"}) is None
    assert same_ids(a, b | {"path": "gone", "ids": str(ids_fingerprint(content(tmp_path / "b")))}) is True
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert same_ids(a, b) is None  # another file by now


@pytest.fixture
def prepared(tokenizer_folder: Path, corpus: Path, tmp_path: Path) -> tuple[str, Path]:
    """A dataset, and its tokenizer as transformers saves it again."""
    (prefix,) = preprocess([str(corpus)], str(tmp_path / "a"), str(tokenizer_folder), separator="<s>", workers=1)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json")).save_pretrained(tmp_path / "again")
    return prefix, tmp_path / "again"


def test_a_sidecar_records_it_and_is_held_against_the_model(prepared: tuple[str, Path], tokenizer_folder: Path) -> None:
    prefix, again = prepared
    sidecar = IndexedDataset(prefix).sidecar
    assert sidecar is not None
    assert sidecar["tokenizer"]["ids"] == ids_fingerprint(content(tokenizer_folder))
    made = DatasetTokenizer("data.mixture: a", sidecar["tokenizer"], sidecar["separator"])
    assert check_tokenizers([made], tokenizer_folder, "x") == check_tokenizers([made], again, "x") == []
    swapped = json.loads(content(again))
    for token in swapped["added_tokens"]:  # ids of texts stay: special tokens are no text
        token["content"] = {"<s>": "</s>", "</s>": "<s>"}.get(token["content"], token["content"])
    (again / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(
        UserError, match=r"^data.mixture: a: its separator '<s>' is \[0\] in its tokenizer 'small' .* but"
    ):
        check_tokenizers([made], again, "write x")
    assert len(check_tokenizers([made], again, "write x", allowed=True)) == 1


def test_datasets_of_one_tokenizer_merge_however_it_is_saved(
    prepared: tuple[str, Path], corpus: Path, tmp_path: Path
) -> None:
    prefix, again = prepared
    (other,) = preprocess([str(corpus)], str(tmp_path / "b"), str(again), separator="<s>", workers=1)
    merge([prefix, other], str(tmp_path / "both"))
    assert IndexedDataset(tmp_path / "both").num_documents == 2 * IndexedDataset(prefix).num_documents


def test_what_is_not_known_is_told(tokenizer_folder: Path, tmp_path: Path) -> None:
    unknown = DatasetTokenizer("data.mixture: a", None)
    known = DatasetTokenizer("data.mixture: b", described(tokenizer_folder))
    (first,) = check_tokenizers([unknown, known], tokenizer_folder, "x")
    assert first.startswith("data.mixture: a: it does not say which tokenizer it was made with, so its ids cannot be")
    for model in (None, tmp_path):
        assert len(check_tokenizers([unknown, known], model, "x")) == 2
