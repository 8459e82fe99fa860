"""The command line: its surface, frozen; exit statuses; and how quickly it answers."""

import argparse
import errno
import importlib
import inspect
import os
import resource
import subprocess
import sys
from unittest.mock import create_autospec

import pytest

from megalong import cli
from megalong.commands import checkpoint, data, evaluate, run
from megalong.errors import UserError

# Scripts rely on these names. Adding is fine; renaming or removing breaks somebody.
SURFACE = {
    "quickstart": ["--output"],
    "data preprocess": [
        "--append-eod",
        "--decontaminate",
        "--decontaminate-action",
        "--decontaminate-ngram",
        "--encoder",
        "--group-by",
        "--group-path",
        "--input",
        "--json-keys",
        "--on-error",
        "--output-prefix",
        "--separator",
        "--separator-position",
        "--shard",
        "--tokenizer",
        "--tokenizer-model",
        "--workers",
    ],
    "data merge": ["--input", "--output-prefix"],
    "data inspect": [
        "--documents",
        "--overwrite",
        "--png",
        "--samples",
        "--tokenizer",
        "PREFIX|CONFIG.yaml",
        "section.key=value",
    ],
    "data balance": ["--overwrite", "--png", "--samples", "CONFIG.yaml", "section.key=value"],
    "data plan": ["--overwrite", "--png", "CONFIG.yaml", "section.key=value"],
    "checkpoint import": ["--hf", "--output"],
    "checkpoint verify": ["DIR"],
    "checkpoint export": ["--adapter", "--base", "--checkpoint", "--dtype", "--output", "--step"],
    "import-hf": ["--hf", "--output"],
    "export-hf": ["--adapter", "--base", "--checkpoint", "--dtype", "--output", "--step"],
    "train": ["--nproc", "CONFIG.yaml", "section.key=value"],
    "evaluate perplexity": [
        "--allow-other-tokenizer",
        "--checkpoint",
        "--data",
        "--dtype",
        "--held-out",
        "--hf",
        "--nproc",
        "--output",
        "--overwrite",
        "--rope",
        "--samples",
        "--seq-length",
    ],
    "generate": [
        "--chat",
        "--checkpoint",
        "--dtype",
        "--hf",
        "--max-new-tokens",
        "--prefill-chunk",
        "--prompt",
        "--prompt-file",
        "--seed",
        "--temperature",
        "--top-k",
        "--top-p",
    ],
    "slurm": ["--chain", "--nodes", "--output", "--submit", "CONFIG.yaml", "section.key=value"],
    "preflight": ["CONFIG.yaml", "section.key=value"],
    "doctor": [],
}


def surface(parser: argparse.ArgumentParser, path: str = "") -> dict[str, list[str]]:
    names: list[str] = []
    found: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found.update(surface(inner, f"{path} {name}".strip()))
        elif not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            names += action.option_strings or [str(action.metavar)]
    return found or {path: sorted(names)}


def test_commands_and_options_are_frozen():
    assert surface(cli.build_parser()) == SURFACE


@pytest.fixture
def answers(monkeypatch):
    """Replace the function behind `command` by one that does `what` with the parsed options."""

    def install(command: str, what):
        families = (checkpoint, data, evaluate, run)
        (family,) = [family for family in families if hasattr(family, f"_run_{command}")]
        monkeypatch.setattr(family, f"_run_{command}", what)

    return install


def stop(error: BaseException):
    def run(options):
        raise error

    return run


def test_exit_statuses(answers, capsys):
    answers("doctor", lambda options: 0)
    assert cli.main(["doctor"]) == 0
    answers("doctor", stop(UserError("data.seq_length: 'x' is not a whole number")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "megalong: error: data.seq_length: 'x' is not a whole number\n"
    answers("doctor", stop(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == ""
    answers("doctor", stop(OSError(errno.ENOSPC, "No space left on device", "runs/config.yaml")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("megalong: error: runs/config.yaml: No space left on device; make room")
    answers("doctor", stop(PermissionError(errno.EACCES, "Permission denied", "data/c4.bin")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("megalong: error: data/c4.bin: Permission denied; let this user")
    for bug in (ValueError("a bug"), BrokenPipeError("between processes"), OSError(errno.EIO, "a broken disk")):
        answers("doctor", stop(bug))
        with pytest.raises(type(bug)):
            cli.main(["doctor"])


def test_of_many_ranks_the_first_alone_speaks(answers, capsys, monkeypatch):
    answers("train", stop(UserError("told once")))
    for rank in ("0", "1", "7"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err == "megalong: error: told once\n"


@pytest.mark.parametrize(
    "words",
    [
        ["run.yaml", "a.b=1", "c.d=-2", "--nproc", "2"],
        ["run.yaml", "--nproc", "2", "a.b=1", "c.d=-2"],
        ["--nproc", "2", "run.yaml", "a.b=1", "c.d=-2"],
        ["run.yaml", "a.b=1", "--nproc=2", "c.d=-2"],
    ],
)
def test_train_takes_overrides_on_either_side_of_an_option(answers, words):
    seen = []
    answers("train", lambda options: seen.append((options.config, options.overrides, options.nproc)) or 0)
    assert cli.main(["train", *words]) == 0
    assert seen == [("run.yaml", ["a.b=1", "c.d=-2"], 2)]


def test_trains_status_is_the_commands(answers):
    answers("train", lambda options: 3)
    assert cli.main(["train", "run.yaml"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command trian; did you mean train? (see megalong --help)"),
        (["data", "inspcet"], "unknown command inspcet; did you mean inspect? (see megalong data --help)"),
        (["xyzzy"], "unknown command xyzzy; known: quickstart, data, "),
        ([], "the following arguments are required: COMMAND"),
        (["train"], "the following arguments are required: CONFIG.yaml"),
        (["train", "run.yaml", "--nprocs=2"], "unknown argument --nprocs=2; did you mean --nproc?"),
        (["train", "run.yaml", "--npro", "2"], "unknown argument --npro; did you mean --nproc?"),
        (["train", "run.yaml", "--nproc", "0"], "argument --nproc: 0 is not a whole number of at least 1"),
        (["train", "run.yaml", "--nproc", "two"], "argument --nproc: two is not a whole number of at least 1"),
        (["data", "inspect", "a", "b"], "unknown argument b; one argument too many"),
        (["evaluate", "perplexity", "--data", "d", "--seq-length", "8"], "one of the arguments --checkpoint --hf"),
        (["export-hf", "--checkpoint", "c", "--output", "o", "--step", "-1"], "argument --step: "),
        (["export-hf", "--checkpoint", "c", "--output", "o", "--dtype", "fp8"], "argument --dtype: invalid choice"),
    ],
)
def test_a_wrong_line_is_told_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"megalong: error: {message}")
    assert err.count("\n") == 1


def test_step_zero_is_an_imported_checkpoint(answers):
    seen = []
    answers("export", lambda options: seen.append(options.step) or 0)
    assert cli.main(["checkpoint", "export", "--checkpoint", "c", "--output", "o", "--step", "0"]) == 0
    assert seen == [0]


# Least words of each command -> the function that answers, and what it must be called with.
ANSWERS = {
    "quickstart": ("megalong.quickstart", "quickstart", {"output": "quickstart-run"}),
    "data preprocess --input a b --output-prefix p --tokenizer-model t --workers 3": (
        "megalong.data.corpus.preprocess",
        "preprocess",
        {
            "inputs": ["a", "b"],
            "output_prefix": "p",
            "tokenizer": "t",
            "json_keys": ["text"],
            "append_eod": False,
            "separator": None,
            "separator_position": "between",
            "workers": 3,
            "on_error": "fail",
            "group_by": None,
            "group_path": "path",
            "shard": None,
            "decontaminate": [],
            "decontaminate_action": "drop",
            "decontaminate_ngram": 13,
            "encoder": "gigatoken",
        },
    ),
    "data merge --input a b --output-prefix p": (
        "megalong.data.merge",
        "merge",
        {"inputs": ["a", "b"], "output_prefix": "p"},
    ),
    "data inspect p": (
        "megalong.data.inspect",
        "inspect",
        {"prefix": "p", "documents": 3, "tokenizer": None, "png": None, "overwrite": False},
    ),
    "data balance run.yaml a.b=1": (
        "megalong.planning.balance",
        "balance",
        {"config_file": "run.yaml", "overrides": ["a.b=1"], "samples": 8, "png": None, "overwrite": False},
    ),
    "data plan run.yaml a.b=1 --png p": (
        "megalong.planning.data_plan",
        "plan",
        {"config_file": "run.yaml", "overrides": ["a.b=1"], "png": "p", "overwrite": False},
    ),
    "import-hf --hf h --output o": ("megalong.hf.convert", "import_hf", {"hf": "h", "output": "o"}),
    "export-hf --checkpoint c --output o --dtype float32": (
        "megalong.hf.convert",
        "export_hf",
        {"checkpoint": "c", "output": "o", "step": None, "dtype": "float32"},
    ),
    "checkpoint export --checkpoint c --adapter --output o --step 3": (
        "megalong.hf.convert",
        "export_adapter",
        {"checkpoint": "c", "output": "o", "step": 3, "dtype": None, "base": None},
    ),
    "train run.yaml a.b=1": (
        "megalong.training.launch",
        "train",
        {"config_path": "run.yaml", "overrides": ["a.b=1"], "nproc": None},
    ),
    "evaluate perplexity --hf h --data d --seq-length 64": (
        "megalong.evaluation.command",
        "perplexity",
        {
            "models": (("hf", "h"),),
            "data": "d",
            "held_out": None,
            "seq_length": 64,
            "samples": 8,
            "nproc": None,
            "dtype": None,
            "output": None,
            "overwrite": False,
            "allow_other_tokenizer": False,
        },
    ),
    "generate --hf h --prompt p --top-k 5": (
        "megalong.evaluation.generate",
        "generate",
        {
            "checkpoint": None,
            "hf": "h",
            "prompt": "p",
            "prompt_file": None,
            "chat": False,
            "dtype": None,
            "max_new_tokens": 128,
            "temperature": 0.0,
            "top_p": None,
            "top_k": 5,
            "seed": 1234,
            "prefill_chunk": 4096,
        },
    ),
    "slurm run.yaml a.b=1 --nodes 4 --chain sft.yaml": (
        "megalong.slurm.chain",
        "slurm",
        {
            "config": "run.yaml",
            "overrides": ["a.b=1"],
            "nodes": 4,
            "submit": False,
            "chain": ["sft.yaml"],
            "output": None,
        },
    ),
    "preflight run.yaml a.b=1": (
        "megalong.training.preflight",
        "preflight",
        {"config_path": "run.yaml", "overrides": ["a.b=1"]},
    ),
    "doctor": ("megalong.cluster.doctor", "doctor", {}),
}


@pytest.mark.parametrize("line", ANSWERS)
def test_a_command_calls_its_function_as_that_function_is_written(line, monkeypatch):
    module, name, expected = ANSWERS[line]
    function = getattr(importlib.import_module(module), name)
    double = create_autospec(function, return_value=0)  # refuses what the real signature refuses
    monkeypatch.setattr(f"{module}.{name}", double)
    assert cli.main(line.split()) == 0
    called = inspect.signature(function).bind(*double.call_args.args, **double.call_args.kwargs).arguments
    assert called == expected


def python(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    arguments = ["-c", code] if code else ["-m", "megalong", *words]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_answers_at_once():
    """0.3 s, in processor time: other work on the machine must not fail it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python("--help").stdout.startswith("usage: megalong")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_the_command_line_and_data_need_no_torch():
    code = (
        "import sys, megalong.cli, megalong.data.inspect, megalong.planning.data_plan\n"
        "import megalong.data.corpus.preprocess\n"
        "print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])"
    )
    done = python(code=code)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_memory_that_the_machine_does_not_have_is_one_line(library, answers, capsys):
    answers("doctor", lambda _: importlib.import_module(library).empty(10**15))
    assert cli.main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megalong: error: out of memory: ")
    assert told.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    code = (
        "import sys; from megalong import cli; from megalong.commands import run\n"
        "run._run_doctor = lambda options: [print('x' * 80) for _ in range(100000)] and 0\n"
        "sys.exit(cli.main(['doctor']))"
    )
    command = f'set -o pipefail; "{sys.executable}" -c "$CODE" | head -n 1'
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "CODE": code}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("x" * 80 + "\n", "")
    assert done.returncode == 1


def test_doctor_names_what_it_looks_for():
    done = python("doctor")
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "python",
        "torch",
        "megatron-core",
        "transformer-engine",
        "apex",
        "DALI",
        "transformers",
        "tokenizers",
        "GPU",
        "will use",
    ]
