"""Data of another tokenizer than the model's: refused before a process starts, by every command that reads it."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megalong.batches.open_samples import check_tokenizer, open_samples
from megalong.cli import main
from megalong.config.schema import Config
from megalong.data.corpus.preprocess import preprocess
from megalong.errors import UserError
from megalong.evaluation.source import find_model, open_held_out
from megalong.training.start import find_start
from tests.llama import make_llama, run_settings

PROSE = list(pydoc_data.topics.topics.values())
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def save_tokenizer(folder: Path, texts: list[str], template: str | None = TEMPLATE) -> Path:
    """All of the same 512 entries in number and separators, each from other texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def dataset(folder: Path, tokenizer: Path) -> str:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text[:3000]}) + "\n" for text in PROSE[:40]))
    (prefix,) = preprocess(
        [str(folder / "texts.jsonl")], str(folder / tokenizer.name), str(tokenizer), separator="<s>", workers=1
    )
    return prefix


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, the same saved again, another, and a dataset of each."""
    folder = tmp_path_factory.mktemp("made")
    save_tokenizer(make_llama(folder / "hf"), PROSE[:10])
    again = PreTrainedTokenizerFast.from_pretrained(folder / "hf")
    again.add_special_tokens({"pad_token": "<pad>"})
    again.save_pretrained(folder / "again")
    save_tokenizer(folder / "other", ["def f(x): return x\n" * 50, *PROSE[30:40]])
    for name in ("hf", "again", "other"):
        dataset(folder, folder / name)
    return folder


def data_of(made: Path, name: str) -> str:
    return str(made / f"{name}_text_document")


def settings(made: Path, run: Path, *names: str, **sections: Any) -> dict[str, Any]:
    tree = run_settings(run, made / "hf", Path(data_of(made, names[0])), **sections)
    tree["data"]["mixture"] = [{"name": name, "path": data_of(made, name), "weight": 1.0} for name in names]
    return tree


def written(tree: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def told_both(made: Path, where: str) -> str:
    model = made / "hf"
    return f"{where}: its tokenizer 'other' ({made / 'other'}) gives other ids than the model's 'hf' ({model}); use the"


def test_train_and_plan_refuse_it_by_name(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(settings(made, tmp_path / "run", "other"), tmp_path / "run.yaml")
    expected = told_both(made, "data.mixture: other")
    assert expected in refusal(capsys, "train", config, "--nproc", "2")
    assert expected in refusal(capsys, "data", "plan", config)
    assert not (tmp_path / "run").exists()
    assert main(["data", "plan", config, "data.allow_other_tokenizer=true"]) == 0
    assert "allowed by data.allow_other_tokenizer: true" in capsys.readouterr().err


def test_a_blend_compares_all_and_the_same_saved_again_is_the_same(made: Path, tmp_path: Path, capsys) -> None:
    tree = settings(made, tmp_path / "run", "hf", "again")
    assert main(["data", "plan", written(tree, tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().err == ""
    config = Config.model_validate(tree)
    start = find_start(config)
    assert check_tokenizer(config, open_samples(config, "train", None, None), start.assets) == []
    mixed = written(settings(made, tmp_path / "run", "hf", "other"), tmp_path / "mixed.yaml")
    assert "'other' with 'other', which gives other ids" in refusal(capsys, "train", mixed)


def test_evaluate_refuses_it(made: Path) -> None:
    source = find_model(hf=made / "hf")
    for name in ("hf", "again"):
        open_held_out(data_of(made, name), 64, 2, source)
    with pytest.raises(UserError) as error:
        open_held_out(data_of(made, "other"), 64, 2, source)
    assert told_both(made, f"--data {data_of(made, 'other')}") in str(error.value)
    open_held_out(data_of(made, "other"), 64, 2, source, allow_other_tokenizer=True)


def test_what_one_of_both_does_not_tell_is_said(made: Path, tmp_path: Path, capsys) -> None:
    bare = tmp_path / "bare"
    for ending in (".bin", ".idx"):
        bare.with_suffix(ending).write_bytes(Path(data_of(made, "hf") + ending).read_bytes())
    tree = settings(made, tmp_path / "run", "hf")
    tree["data"]["mixture"][0]["path"] = str(bare)
    assert main(["data", "plan", written(tree, tmp_path / "run.yaml")]) == 0
    assert "warning: data.mixture: hf: it does not say which tokenizer" in capsys.readouterr().err
    tree = settings(made, tmp_path / "run", "hf")
    tree["model"]["load"]["hf"] = str(make_llama(tmp_path / "plain"))
    assert main(["data", "plan", written(tree, tmp_path / "run.yaml")]) == 0
    assert "plain contains no tokenizer.json to compare" in capsys.readouterr().err


def test_a_run_says_what_is_not_known_and_a_resume_is_held_against_its_own(made: Path, pool, tmp_path: Path) -> None:
    tree = settings(made, tmp_path / "run", "other", training={"train_iters": 1}, optimizer={"warmup_iters": 0})
    tree["data"]["allow_other_tokenizer"] = True
    pool.run(1, "tests.training.workers:train_run", tree)
    tree["data"]["allow_other_tokenizer"] = False
    tree["model"]["load"]["hf"] = "gone"
    config = Config.model_validate(tree)
    start = find_start(config)
    assert start.resume is not None
    with pytest.raises(UserError, match=r"its tokenizer 'other' .* gives other ids than the model's 'tokenizer'"):
        check_tokenizer(config, open_samples(config, "train", None, None), start.assets)


def test_conversations_are_held_against_the_model_too(made: Path, tmp_path: Path, capsys) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns, "id": n}) + "\n" for n in range(20)))
    tree = settings(made, tmp_path / "run", "hf")
    tree |= {"task": "sft", "sft": {"tokenizer": str(made / "other"), "deduplicate": False}}
    tree["sft"]["sources"] = [{"name": "chats", "path": str(tmp_path / "chats.jsonl")}]
    tree["data"] = {"seq_length": 64, "packing": "best_fit", "split": "50,50"}
    told = refusal(capsys, "train", written(tree, tmp_path / "sft.yaml"))
    assert told_both(made, "sft") in told
    tree["sft"]["tokenizer"] = str(made / "again")
    config = Config.model_validate(tree)
    samples = open_samples(config, "train", made / "hf", tmp_path / "run/index")
    assert check_tokenizer(config, samples, made / "hf") == []
