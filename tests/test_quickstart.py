"""The quickstart: its parts alone, and (slow) the whole story with a handful of training steps."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

import megalong
from megalong.config.load import load_config
from megalong.errors import UserError
from megalong.evaluation.perplexity import PerplexityResult
from megalong.quickstart import chats, corpus, report, story
from megalong.quickstart.steps import Commands, Step, StepFailed, run_steps
from megalong.runtime.folders import folder_aside

EXAMPLES = Path(__file__).parents[1] / "examples" / "quickstart"
SCRIPT = EXAMPLES.parent / "quickstart.sh"


def test_held_out_documents_are_never_trained_on():
    code, prose = [f"c{n}" for n in range(100)], [f"p{n}" for n in range(40)]
    split = corpus.split_corpus(code, prose)
    assert sorted(split["code"] + split["prose"] + split["heldout"]) == sorted(code + prose)
    assert sum(text.startswith("c") for text in split["heldout"]) == 7
    assert sum(text.startswith("p") for text in split["heldout"]) == 3
    assert split == corpus.split_corpus(code, prose)


def test_the_corpus_is_this_pythons_own_text(tmp_path):
    corpus.write_corpus(tmp_path)
    texts = corpus.training_texts(tmp_path)
    assert sum(map(len, texts)) > 5_000_000
    assert any("class JSONDecoder" in text for text in [*texts, *_texts(tmp_path / "heldout.jsonl")])
    assert sum(len(text) > 40_000 for text in texts) > 20  # long documents: far context to learn from


def _texts(path):
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


SOURCE = '''
"""Cats and mats,

and more."""
class Cat:
    """One that sits
    on a mat."""
    def sit(self, mat, *, long=False):
        """Sit down on it."""
    def _hide(self): """Nobody asks for this one."""
def feed(cat): pass
async def call(cat): "Call it, loudly, until it comes."
'''


def test_questions_are_answered_by_docstrings():
    assert chats.questions("zoo", SOURCE) == [
        ("What is the class zoo.Cat?", "One that sits on a mat."),
        ("What does the function zoo.call(cat) do?", "Call it, loudly, until it comes."),
    ]
    assert chats.questions("zoo", SOURCE.replace("Sit down", "Sit down for long"))[1] == (
        "What does the method zoo.Cat.sit(mat, long) do?",
        "Sit down for long on it.",
    )
    assert chats.questions("zoo", "print 'no Python of today'") == []


def test_a_python_without_sources_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no sources of the standard library"):
        corpus.standard_library()


def test_steps_that_are_done_are_skipped_and_the_rest_is_timed(capsys):
    ran = []
    steps = [
        Step("one", "why", lambda: True, lambda: ran.append(1)),
        Step("two", "", lambda: False, lambda: ran.append(2)),
    ]
    assert list(run_steps(steps)) == ["two"]
    assert ran == [2]
    out = capsys.readouterr().out
    assert "━━ 1/2 one ━" in out
    assert "done before" in out


def test_a_step_that_fails_leaves_nothing_behind(tmp_path):
    def fails():
        with folder_aside(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fails()
    assert not list(tmp_path.iterdir())
    with folder_aside(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/whole"]


def test_a_failed_command_gives_its_status_on(tmp_path, capfd):
    with pytest.raises(StepFailed) as failure:
        Commands(tmp_path)("train", "no such.yaml")
    assert failure.value.code == 2
    assert "$ megalong train 'no such.yaml'" in capfd.readouterr().out


def test_outside_a_checkout_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(megalong, "__file__", str(tmp_path / "site-packages" / "megalong" / "__init__.py"))
    with pytest.raises(UserError, match="run the quickstart from a checkout"):
        story.quickstart(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_configurations_agree_with_the_story():
    pretrain, extend, tune = (load_config(EXAMPLES / name)[0] for name in story.CONFIGS)
    rope = extend.model.rope
    assert rope.type == "yarn"
    assert extend.data.seq_length == rope.factor * pretrain.data.seq_length == 16 * story.model.ORIGINAL_LENGTH
    assert extend.parallel.context_parallel_size == int(story.PROCESSES) == extend.grid.model_parallel_size
    assert tune.model.load.checkpoint == extend.run.dir
    assert (tune.task, tune.sft.sources[0].path) == ("sft", f"chats/{chats.CHATS}")
    assert pretrain.data.separator == extend.data.separator == story.model.SEPARATOR


def test_the_report_states_what_was_measured(tmp_path, capsys):
    def result(name, *values):
        return PerplexityResult(name, name, [], 512, 4, [0, 64, 256, 512], [math.log(v) for v in values], [1, 1, 1])

    results = [result("base", 40, 20, 80), result("extended", 41, 22, 11)]
    answers = report.Answers("What is it?", "A cat.", "def\n  it():", "")
    report.write_report(tmp_path, results, "logits agree", answers, 256, {"import": 3.0})
    text = (tmp_path / "report.md").read_text()
    assert "- base: 20.0 just inside its 256 tokens, 80.0 at the end of 512: 4.0 times worse." in text
    assert "- extended: 22.0 and 11.0: 0.50 times." in text
    assert "logits agree" in text
    assert "- the docstring: `A cat.`\n- before fine-tuning: `def it():`\n- after fine-tuning: `(nothing)`" in text
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in text
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000
    assert text in capsys.readouterr().out


def _small(name, **changes):
    tree = yaml.safe_load((EXAMPLES / name).read_text())
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    return yaml.safe_dump(tree)


def _processes_in(folder):
    """Processes that work in `folder`; those that end while we look do not."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder):
                found.append(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)  # minutes of training, on whatever CPU
def test_the_whole_story_stopped_once_and_taken_up_again(tmp_path):
    """Every step by its real command; the first start is interrupted in the middle of training, which saves."""
    folder = tmp_path / "story"
    folder.mkdir()
    few = {
        "training": {"train_iters": 30},  # a fast CPU does several steps while the interrupt is on its way
        "checkpoint": {"save_interval": 4},
        "logging": {"log_interval": 1},
        "optimizer": {"warmup_iters": 1},
    }
    (folder / "pretrain.yaml").write_text(_small("pretrain.yaml", **few))
    few |= {"training": {"train_iters": 3}, "data": {"seq_length": 1024}}
    (folder / "extend.yaml").write_text(_small("extend.yaml", **few))
    few |= {"data": {"seq_length": 512}}
    (folder / "sft.yaml").write_text(_small("sft.yaml", **few))
    command = [sys.executable, "-m", "megalong", "quickstart", "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in started.stdout:
        if "step 6/30 " in line:
            started.send_signal(2)
            break
    started.communicate(timeout=60)
    assert started.returncode == 130
    assert not _processes_in(folder)  # the ranks have gone with it
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 5
    assert 6 <= int(re.search(r"resumed from \S+step-(\d+)", done.stderr)[1]) < 30
    text = (folder / "report.md").read_text()
    for name in (story.BASE, story.UNTRAINED, story.EXTENDED):
        assert re.search(rf"^\| {name} +\|", text, re.MULTILINE)
    assert float(re.search(r"differ by at most (\S+)", text)[1]) < 1e-2
    assert float(re.search(r"with exact angles it is ([\d.e-]+)", text)[1]) < 1e-4
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 16
    asked = json.loads((folder / "chats" / chats.ASKED).read_text())
    assert asked["question"] not in (folder / "chats" / chats.CHATS).read_text()
    assert f"- the docstring: `{asked['docstring']}`" in text
    assert "- after fine-tuning: `" in text
    assert "docstrings: " in (folder / "runs" / "tuned" / "log.txt").read_text()


def test_the_script_is_there_and_parses():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert "setup_env.sh" in SCRIPT.read_text()
