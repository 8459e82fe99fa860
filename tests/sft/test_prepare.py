"""What is read, kept and left out: formats, rules, duplicates, benchmarks, weights; and the command line around it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalong.cli import main
from megalong.config.sft import Sft
from megalong.data import workers
from megalong.errors import UserError
from megalong.sft import reading
from megalong.sft.prepare import Prepared, prepare
from megalong.sft.samples import ConversationSamples
from megalong.training import events
from tests.sft.chats import chats, make_tokenizer, write_lines
from tests.sft.test_training import sft_settings

QUESTION, ANSWER = "What is the answer?", "It was the cat."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "conversations": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "messages in parts": {"messages": [MESSAGES[0] | {"content": [{"type": "text", "text": QUESTION}]}, MESSAGES[1]]},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt_completion as lists": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}


def prepared(
    folder: Path, records: list[Any], length: int = 200, max_samples: int | None = None, **rules: Any
) -> Prepared:
    make_tokenizer(folder / "tokenizer", "chatml")
    lines = write_lines(folder / "chats.jsonl", records)
    sft = Sft(sources=[{"name": "chats", "path": str(lines), "max_samples": max_samples}], **rules)
    return prepare(sft, length, folder / "tokenizer", folder / "index")


def test_all_formats_say_the_same(tmp_path: Path) -> None:
    found = prepared(tmp_path, list(FORMATS.values()), deduplicate=False)
    assert len(found.ends) == len(FORMATS)
    assert len({tuple(ids) for ids in np.split(found.ids, found.ends[:-1])}) == 1
    once = prepared(tmp_path, list(FORMATS.values()))
    assert len(once.ends) == 1
    assert once.report["chats"]["counts"] == {"duplicate": len(FORMATS) - 1}


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    lines = prepared(tmp_path, [FORMATS["messages"], FORMATS["alpaca"]])
    table = pyarrow.Table.from_pylist([{"messages": MESSAGES}])
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    sft = Sft(sources=[{"name": "t", "path": str(tmp_path / "chats.parquet")}])
    assert prepare(sft, 200, tmp_path / "tokenizer", tmp_path / "i").ids.tolist() == lines.ids.tolist()


TURN = pyarrow.struct(
    [("role", pyarrow.dictionary(pyarrow.int8(), pyarrow.string())), ("content", pyarrow.string_view())]
)
TURNS = {
    "large_list": pyarrow.large_list(TURN),
    "list_view": pyarrow.list_view(TURN),
    "fixed_size_list": pyarrow.list_(TURN, 2),
    "map": pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string())),
    "a time beside the text": pyarrow.list_(pyarrow.struct([*TURN, ("at", pyarrow.timestamp("ns"))])),
}


@pytest.mark.parametrize("kind", TURNS)
def test_turns_of_every_arrow_type_are_the_same(tmp_path: Path, kind: str) -> None:
    """With columns beside them that Python's types cannot hold: Spark's times in nanoseconds, pictures."""
    lines = prepared(tmp_path, [FORMATS["messages"]])
    turns = [list(turn.items()) for turn in MESSAGES] if kind == "map" else [turn | {"at": 1} for turn in MESSAGES]
    columns = {
        "messages": pyarrow.array([turns], TURNS[kind]),
        "created": pyarrow.array([1], pyarrow.timestamp("ns")),
        "picture": pyarrow.array([b"\xff"]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "chats.parquet")
    sft = Sft(sources=[{"name": "t", "path": str(tmp_path / "chats.parquet")}])
    assert prepare(sft, 200, tmp_path / "tokenizer", tmp_path / "i").ids.tolist() == lines.ids.tolist()


def test_text_of_a_table_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    """Under a column of its own and within a list: as in a line of JSON, counted and never replaced."""
    make_tokenizer(tmp_path / "tokenizer", "chatml")
    text = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    turn = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "user"]), text], ["role", "content"])
    asked = pyarrow.ListArray.from_arrays([0, 1, 2], turn)
    for number, prompt in enumerate((text, asked)):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": prompt, "completion": ["a", "b"]}), tmp_path / "c.parquet")
        sft = Sft(sources=[{"name": "t", "path": str(tmp_path / "c.parquet")}], on_malformed="drop")
        report = prepare(sft, 200, tmp_path / "tokenizer", tmp_path / str(number)).report["t"]
        assert report["counts"] == {"malformed": 1}
        assert re.search(r"row 2: .*column 'prompt': not UTF-8", report["examples"]["malformed"][0])


BAD: dict[str, Any] = {
    "empty": {"messages": [{"role": "user", "content": " "}]},
    "no_assistant": {"messages": MESSAGES[:1]},
    "unknown_role": {"messages": [{"role": "wizard", "content": "x"}, *MESSAGES]},
    "malformed": {"text": "x"},
    "too_long": {"messages": [MESSAGES[0], {"role": "assistant", "content": ANSWER * 50}]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_conversation_is_counted_or_ends_the_run(reason: str, tmp_path: Path) -> None:
    found = prepared(tmp_path, [FORMATS["messages"], BAD[reason]], **{f"on_{reason}": "drop"})
    assert len(found.ends) == 1
    assert found.report["chats"]["counts"] == {reason: 1}
    assert "chats.jsonl, line 2: " in found.report["chats"]["examples"][reason][0]
    with pytest.raises(UserError, match=rf"chats\.jsonl, line 2: .*write sft\.on_{reason}: drop$"):
        prepared(tmp_path, [FORMATS["messages"], BAD[reason]], **{f"on_{reason}": "error"})
    with pytest.raises(UserError, match=rf"none of its 1 conversations can be used \({reason}: 1\)"):
        prepared(tmp_path, [BAD[reason]], **{f"on_{reason}": "drop"})


def test_a_broken_line_or_template_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chats\.jsonl, line 1: a list and not an object"):
        prepared(tmp_path, [[1, 2]])
    lines = tmp_path / "half.jsonl"
    lines.write_text(json.dumps(FORMATS["alpaca"]) + '\n{"messages": [{"role": "us')
    sft = Sft(sources=[{"name": "half", "path": str(lines)}])
    with pytest.raises(UserError, match=r"half\.jsonl, line 2: not valid JSON \(.*write sft\.on_malformed: drop$"):
        prepare(sft, 200, tmp_path / "tokenizer", tmp_path / "index")
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError, match=r"the chat template of .*tokenizer is broken at line 2: unexpected"):
        prepare(sft, 200, tmp_path / "tokenizer", tmp_path / "index")
    template.unlink()
    with pytest.raises(UserError, match=r"has no chat template; put a chat_template\.jinja beside"):
        prepare(sft, 200, tmp_path / "tokenizer", tmp_path / "index")


def test_what_is_too_long_is_cut(tmp_path: Path) -> None:
    found = prepared(tmp_path, [BAD["too_long"]], length=50, on_too_long="truncate")
    assert found.ends.tolist() == [50]
    assert found.report["chats"]["counts"] == {"truncated": 1}


def test_a_conversation_of_a_benchmark_is_dropped(tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    write_lines(tmp_path / "bench.jsonl", [{"question": text}, {"question": "Who wrote this one?"}, {"answer": "Yes"}])
    records = [
        {"prompt": f"Say: {text.upper()}!", "completion": "No."},
        {"prompt": "who wrote this one", "completion": "No."},
        {"prompt": "And who wrote this one?", "completion": "Yes"},
        FORMATS["messages"],
    ]
    found = prepared(tmp_path, records, decontaminate=[str(tmp_path / "bench.jsonl")])
    assert found.report["chats"]["counts"] == {"contaminated": 2}
    (left_out,) = tmp_path.glob("index/sft-*/left_out.jsonl")
    first, second = map(json.loads, left_out.read_text().splitlines())
    assert first["place"].endswith("chats.jsonl, line 1")
    assert (first["source"], first["reason"]) == ("chats", "contaminated")
    assert first["detail"].startswith(f"{tmp_path / 'bench.jsonl'}: one two three")
    assert second["detail"] == f"{tmp_path / 'bench.jsonl'}: who wrote this one"
    assert [place.split(": ")[0][-6:] for place in found.report["chats"]["examples"]["contaminated"]] == [
        "line 1",
        "line 2",
    ]


def test_weights_are_shares_of_tokens_and_every_conversation_has_its_turn(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", "chatml")
    few = write_lines(tmp_path / "few.jsonl", [{"messages": one} for one in chats(9)])
    many = write_lines(tmp_path / "many.jsonl", [{"messages": one} for one in chats(70)[10:]])
    sources = [{"name": "few", "path": str(few), "weight": 1.0}, {"name": "many", "path": str(many), "weight": 2.0}]
    found = prepare(Sft(sources=sources), 200, tmp_path / "tokenizer", tmp_path / "index")
    samples = ConversationSamples(found, [1.0, 2.0], 200, 1, "1,0", "train")
    epochs = [samples._epoch(epoch)[0] for epoch in range(12)]
    seen = np.concatenate(epochs)
    shares = np.bincount(found.sources[seen], weights=found.lengths[seen])
    assert shares[1] / shares[0] == pytest.approx(2, rel=0.1)
    for source in (0, 1):
        times = np.bincount(seen, minlength=len(found.ends))[found.sources == source]
        assert times.max() - times.min() <= 1


def test_the_outcome_does_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"messages": one} for one in chats(300)]
    records[5], records[7], records[290] = BAD["empty"], records[3], BAD["no_assistant"]
    monkeypatch.setattr(reading, "CHUNK", 16)
    monkeypatch.setattr(reading, "BYTES_PER_WORKER", 1)
    started: list[int] = []
    monkeypatch.setattr(reading, "map_in_order", lambda *a: (started.append(a[2]), workers.map_in_order(*a))[1])
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(reading, "available_cores", lambda: cores)  # noqa: B023
        found.append(prepared(tmp_path / str(cores), records, max_samples=250))
    assert started == [3]
    for name in ("ids", "targets", "ends", "sources"):
        assert getattr(found[0], name).tolist() == getattr(found[1], name).tolist()
    reports = [json.dumps(one.report).replace(str(tmp_path / str(n)), "") for n, one in zip((1, 3), found, strict=True)]
    assert reports[0] == reports[1]
    assert found[0].report["chats"]["counts"] == {"empty": 1, "duplicate": 1}
    assert len(found[0].ends) == 250
    with pytest.raises(UserError, match=r"line 6: no turn has any text; fix it, or write sft.on_empty: drop"):
        prepared(tmp_path / "3", records, on_empty="error")
    assert not list(tmp_path.glob("*/index/*.tmp-*"))


def test_samples_are_shown_with_the_mask_over_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = sft_settings(tmp_path)
    settings["data"]["seq_length"] = 120
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    write_lines(tmp_path / "chats.jsonl", [FORMATS["alpaca"], BAD["empty"]])
    assert main(["data", "inspect", str(tmp_path / "run.yaml"), "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "chats: 1 conversations of 2, " in shown
    assert (
        f"| ⟨<|im_start|>user\n  | {QUESTION}<|im_end|>\n  | <|im_start|>assistant\n  | ⟩{ANSWER}<|im_end|>⟨" in shown
    )


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = sft_settings(tmp_path)
    settings["training"] = {"train_iters": 3, "global_batch_size": 2}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    write_lines(tmp_path / "chats.jsonl", [BAD["empty"]])
    assert main(["train", str(tmp_path / "run.yaml"), "--nproc", "2"]) == 2
    assert "none of its 1 conversations can be used (empty: 1)" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml"), "data.packing=naive"]) == 2
    assert "write packing: best_fit" in capsys.readouterr().err
    write_lines(tmp_path / "chats.jsonl", [BAD["empty"], *({"messages": one} for one in chats(12))])
    assert main(["train", str(tmp_path / "run.yaml"), "--nproc", "2"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "data: chats: 12 conversations of 13" in log
    assert "; empty: 1" in log
    assert "% padding" in log
    assert re.search(r"step 3/3 .* tok/s \(\S+ learnt, \d+ % padding\) \| MFU", log)
    (finished,) = [event for event in events.read(tmp_path / "run") if event["kind"] == "finish"]
    assert finished["tokens"] == 3 * 2 * 163
    assert 0 < finished["learnt_tokens"] < finished["tokens"] - finished["padding_tokens"] < finished["tokens"]
