"""`megalong slurm`: the script it prints is filled and quoted, or refused, and bash itself reads it right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalong import cli
from megalong.config.slurm import seconds
from megalong.slurm.script import training_job

CONFIG = """
run: {name: NAME, dir: DIR}
model: {load: LOAD}
data: {seq_length: 4096, mixture: [{name: a, path: data/a, weight: 1}]}
parallel: {tensor_model_parallel_size: 8}
optimizer: {lr: 3e-5}
training: {train_iters: 10, global_batch_size: 4}
slurm: {partition: gpu, time: "1-12", lead_minutes: 30, options: ["--constraint=h100"], container: "/a b.sqsh"}
"""
SFT = """
task: sft
run: {name: sft, dir: DIR}
model: {load: LOAD}
data: {seq_length: 4096, packing: best_fit}
sft: {sources: [{name: chats, path: chats.jsonl}]}
parallel: {tensor_model_parallel_size: 8}
optimizer: {lr: 3e-5}
training: {train_iters: 10, global_batch_size: 4}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "it's a $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_text(
        CONFIG.replace("NAME", "small").replace("DIR", "runs/one").replace("LOAD", "{hf: h}")
    )
    (folder / "sft.yaml").write_text(SFT.replace("DIR", "runs/two").replace("LOAD", "{checkpoint: runs/one}"))
    (folder / "chats.jsonl").touch()
    return folder


def printed(capsys, *words):
    assert cli.main(["slurm", *words]) == 0
    return capsys.readouterr().out


def test_the_script_is_filled(folder, capsys):
    script = printed(capsys, "run.yaml", "--nodes", "2")
    asked = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=2", "--gpus-per-node=8", "--time=1-12", "--signal=B:USR1@1800", "--requeue"} <= asked
    assert {"--partition=gpu", "--constraint=h100", "--job-name=small"} <= asked
    assert "16 processes, 2 replicas; run folder runs/one" in script


def test_bash_gets_every_word_as_it_was(folder, tmp_path):
    """The script runs with `common.sh` replaced by one that notes what it is given."""
    words = ["data.separator='a  b'", 'run.dir="runs of $USER; `id` \\\\"', "data.split='99,1'"]
    script = training_job("run.yaml", words, 2).script
    note = tmp_path / "note.sh"
    note.write_text(
        'train_on_nodes() { "$MEGALONG_PYTHON" -c "import json, os, sys; print(json.dumps('
        '[os.getcwd(), os.environ[\'CONTAINER\'], *sys.argv[1:]]))" "$@"; }\n'
    )
    lines = [f"source '{note}'" if line.startswith("source ") else line for line in script.splitlines()]
    done = subprocess.run(["bash"], input="\n".join(lines), capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(done.stdout) == [str(folder), "/a b.sqsh", "run.yaml", *words]


@pytest.mark.parametrize("container", ["image.sqsh", "null"])
@pytest.mark.parametrize(
    ("written", "submitted", "expected"),
    [(None, None, None), ("/w/python", None, "/w/python"), (None, "/s/python", "/s/python"), ("/w", "/s", "/s")],
)
def test_the_users_python_wins(folder, tmp_path, monkeypatch, container, written, submitted, expected):
    """That of whoever submits the script, else of whoever wrote it; without one, a container's own or this one."""
    monkeypatch.delenv("MEGALONG_PYTHON", raising=False)
    if written is not None:
        monkeypatch.setenv("MEGALONG_PYTHON", written)
    script = training_job("run.yaml", [f"slurm.container={container}"], 2).script
    monkeypatch.delenv("MEGALONG_PYTHON", raising=False)
    if submitted is not None:
        monkeypatch.setenv("MEGALONG_PYTHON", submitted)
    note = tmp_path / "note.sh"
    note.write_text("train_on_nodes() { env; }\n")
    lines = [f"source '{note}'" if line.startswith("source ") else line for line in script.splitlines()]
    done = subprocess.run(["bash"], input="\n".join(lines), capture_output=True, text=True, check=True)
    default = sys.executable if container == "null" else "python3"
    assert f"MEGALONG_PYTHON={expected or default}" in done.stdout.splitlines()


def test_a_chain_is_submitted_by_dependency(folder, capsys, tmp_path, monkeypatch):
    """With a false sbatch that notes its options and answers with numbers; as `--submit` and as the printed script."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\nn=$(($(ls {tmp_path} | grep -c "^job-") + 1))\n'
        f'(echo "$@"; cat) >{tmp_path}/job-$n\necho "10$n;cluster"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    words = ["run.yaml", "--nodes", "2", "--chain", "sft.yaml"]
    assert printed(capsys, *words, "--submit") == "small: job 101\nsft: job 102\nsft-export: job 103\n"
    submitted = [(tmp_path / f"job-{n}").read_text() for n in (1, 2, 3)]
    for number, (after, last) in enumerate(
        [
            ("--parsable", "train_on_nodes run.yaml"),
            ("--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes", "train_on_nodes sft.yaml"),
            (
                "--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes",
                "--checkpoint runs/two --output runs/two/hf",
            ),
        ]
    ):
        assert submitted[number].splitlines()[0] == after
        assert submitted[number].splitlines()[-1].endswith(last)
    for n in (1, 2, 3):
        (tmp_path / f"job-{n}").unlink()
    script = printed(capsys, *words)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == "small: job 101\nsft: job 102\nsft-export: job 103\n"
    assert [(tmp_path / f"job-{n}").read_text() for n in (1, 2, 3)] == submitted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.yaml", "--nodes", "3"], "run.yaml on 3 nodes: training.global_batch_size 4 is not a multiple"),
        (["run.yaml", "--nodes", "2", "--chain", "run.yaml"], "--chain run.yaml: it starts from something else, but"),
        (["run.yaml", "--nodes", "2", "slurm.time=0:20:00"], "slurm: lead_minutes 30 is not below time 0:20:00"),
        (["run.yaml", "--nodes", "2", "slurm.partition='a b'"], "slurm.partition"),
        (["run.yaml", "--nodes", "2", "slurm.options=['constraint=h100']"], "slurm.options[0]"),
        (["run.yaml", "--nodes", "0"], "0 is not a whole number of at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(folder, capsys, words, message):
    try:
        status = cli.main(["slurm", *words])
    except SystemExit as end:
        status = end.code
    assert status == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not told.out


def test_it_needs_no_torch(folder):
    code = (
        "import sys\nfrom megalong.cli import main\nmain(['slurm', 'run.yaml', '--nodes', '2'])\n"
        "print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("90:30", 5430), ("8:00:00", 28800), ("1-12", 129600), ("2-1:30", 178200), ("1-0:0:5", 86405)],
)
def test_times_are_slurms(time, expected):
    """`man sbatch`, --time."""
    assert seconds(time) == expected


def test_the_examples_can_be_submitted(capsys):
    root = Path(__file__).parents[2]
    for length in ("1m", "2m", "4m"):
        config = root / "examples" / "ultralong" / length / "cpt.yaml"
        assert "256 processes" in printed(capsys, str(config), "--nodes", "32")
