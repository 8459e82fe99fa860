"""`slurm/pretrain.sbatch` under false `srun` and `scontrol`: the commands it would start on each node.

`tests/slurm` runs the same scripts under a real SLURM.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"

CONFIG = """
run: {name: small, dir: RUN_DIR}
model: {load: {hf: llama}}
data: {seq_length: 4096, mixture: [{name: a, path: data/a, weight: 1}]}
parallel: {tensor_model_parallel_size: 8}
optimizer: {lr: 3e-5}
training: {train_iters: 10, global_batch_size: 4}
"""

# srun notes its own options, then starts the task of each node as SLURM would.
SRUN = """#!/usr/bin/env bash
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
kind=srun
for word; do if [ "$word" = preflight ]; then kind=preflight; fi; done
if [[ " ${options[*]} " == *" --nodes=1 "* ]]; then kind=first; fi
printf '%s\\n' "${options[@]}" >"$NOTES/$kind"
if [ "$kind" = first ]; then exec "$@"; fi
if [ "$kind" = preflight ]; then exit "${PREFLIGHT_STATUS:-0}"; fi
for node in 0 1; do SLURM_NODEID=$node "$@" || exit; done
"""
SCONTROL = """#!/bin/sh
case "$*" in
"show hostnames n[3-4]") printf "n3\\nn4\\n" ;;
requeue*) echo "$*" >"$NOTES/requeue" ;;
esac
"""
# python answers the script's own check truly, and notes what torchrun would have been given.
PYTHON = """#!{python}
import json, os, sys
if "megalong.slurm.job" in sys.argv:
    os.execv("{python}", sys.argv)
names = ["MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "NCCL_DEBUG", "CUDA_DEVICE_MAX_CONNECTIONS"]
names += ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"]
noted = {{"words": sys.argv[1:], "env": {{name: os.environ.get(name) for name in names}}, "cwd": os.getcwd()}}
noted |= {{"python": sys.argv[0], "path": os.environ["PYTHONPATH"], "safe": os.environ.get("PYTHONSAFEPATH")}}
path = os.path.join(os.environ["NOTES"], "node-" + os.environ["SLURM_NODEID"])
json.dump(noted, open(path, "w"))
"""


class Cluster:
    """Two nodes of eight GPUs, on paper; every path has a space in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a cluster"
        self.notes = self.folder / "notes"
        self.run_dir = self.folder / "runs of mine" / "small"
        self.config = self.folder / "my run.yaml"
        for path in (self.folder / "bin", self.folder / "venv" / "bin", self.notes):
            path.mkdir(parents=True)
        (self.folder / "slurm").symlink_to(SCRIPT.parent)
        self._program("bin/srun", SRUN)
        self._program("bin/scontrol", SCONTROL)
        self._program("bin/squeue", '#!/bin/sh\necho "${JOB_STATE:-RUNNING}"\n')
        self._program("venv/bin/python", PYTHON.format(python=sys.executable))
        self.config.write_text(CONFIG.replace("RUN_DIR", f'"{self.run_dir}"'))
        for name in ("llama/config.json", "llama/model.safetensors", "data/a.bin", "data/a.idx"):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).touch()

    def _program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def submit(self, *words: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP", "NCCL"))}
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "812345",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[3-4]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "96",
            "VIRTUAL_ENV": str(self.folder / "venv"),
            "PYTHONPATH": str(ROOT),
            "NOTES": str(self.notes),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }
        return subprocess.run(
            ["bash", str(script), *words],
            env={**kept, **slurm, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder.parent,
        )

    def node(self, number: int) -> dict:
        return json.loads((self.notes / f"node-{number}").read_text())


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.iterdir()), ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_each_node_starts_one_torchrun_with_every_word_intact(cluster):
    words = ["data.separator='a  b'", "run.seed=7", 'data.mixture=[{name: a, path: "my data/$HOME *", weight: 1}]']
    (cluster.folder / "my data").mkdir()
    for ending in (".bin", ".idx"):
        (cluster.folder / "my data" / f"$HOME *{ending}").touch()
    done = cluster.submit("my run.yaml", *words)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        node = cluster.node(number)
        assert node["words"] == [
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node-rank={number}",
            "--nproc-per-node=8",
            "--master-addr=n3",
            "--master-port=22345",
            "--no-python",
            "bash",
            str(cluster.folder / "slurm" / "rank.sh"),
            str(cluster.run_dir / "logs" / "812345"),
            str(cluster.folder / "venv" / "bin" / "python"),
            "-m",
            "megalong",
            "train",
            "my run.yaml",
            *words,
        ]
        assert node["cwd"] == str(cluster.folder)
        assert node["env"] == {
            "MASTER_ADDR": "n3",
            "MASTER_PORT": "22345",
            "OMP_NUM_THREADS": "12",
            "NCCL_DEBUG": "WARN",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
        }


def test_logs_lie_in_the_run_folder_a_file_a_node(cluster):
    assert cluster.submit("my run.yaml").returncode == 0
    logs = cluster.run_dir / "logs" / "812345"
    assert logs.is_dir()
    options = (cluster.notes / "srun").read_text().splitlines()
    assert f"--output={logs}/node-%n.log" in options
    assert "--open-mode=append" in options
    assert not any(option.startswith("--container") for option in options)
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--kill-on-bad-exit=1"} <= set(options)


def test_stages_log_in_the_folder_above_theirs(cluster):
    cluster.config.write_text(cluster.config.read_text() + "stages: [{name: a}, {name: b}]\n")
    assert cluster.submit("my run.yaml").returncode == 0
    assert (cluster.run_dir / "logs" / "812345").is_dir()


def test_settings_of_the_user_win(cluster):
    assert cluster.submit("my run.yaml", NCCL_DEBUG="INFO").returncode == 0
    assert cluster.node(0)["env"]["NCCL_DEBUG"] == "INFO"
    assert cluster.node(0)["env"]["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "1", "0 takes fused attention away on Hopper"
    assert cluster.submit("my run.yaml", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0").returncode == 0
    assert cluster.node(0)["env"]["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_a_job_without_gpus_starts_as_many_processes_as_asked(cluster):
    done = cluster.submit("my run.yaml", GPUS_PER_NODE="0", PROCESSES_PER_NODE="4")
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node=4" in cluster.node(1)["words"]
    assert cluster.node(1)["env"]["OMP_NUM_THREADS"] == "24"


def test_a_container_is_the_tasks_own(cluster):
    """Its own Python too, with which the configuration is checked on one node before the others are asked."""
    cluster._program("bin/python3", PYTHON.format(python=sys.executable))
    done = cluster.submit("my run.yaml", CONTAINER="/images/a b.sqsh", CONTAINER_MOUNTS="/data:/data")
    assert done.returncode == 0, done.stderr
    for kind in ("first", "srun"):
        options = (cluster.notes / kind).read_text().splitlines()
        assert {"--container-image=/images/a b.sqsh", "--container-mounts=/data:/data"} <= set(options)
        assert not any(option.startswith("--container-workdir") for option in options)
    assert cluster.node(0)["python"] == str(cluster.folder / "bin" / "python3")
    assert cluster.node(0)["words"][-5] == "python3"


@pytest.mark.parametrize(
    ("mounts", "inside"),
    [("/x,{0}", "{0}"), ("{0}/:{0}:ro", "{0}"), ("{1}:/work", "/work/a cluster"), ("{0}x:/y", None)],
)
def test_a_container_works_in_the_jobs_folder_where_it_shows_it(cluster, mounts, inside):
    cluster._program("bin/python3", PYTHON.format(python=sys.executable))
    names = cluster.folder, cluster.folder.parent
    assert cluster.submit("my run.yaml", CONTAINER="c", CONTAINER_MOUNTS=mounts.format(*names)).returncode == 0
    options = (cluster.notes / "srun").read_text().splitlines()
    folders = [option for option in options if option.startswith("--container-workdir=")]
    assert folders == ([f"--container-workdir={inside.format(*names)}"] if inside else [])


@pytest.mark.parametrize("container", ["", "/images/a.sqsh"])
def test_the_users_python_wins(cluster, container):
    cluster._program("my python", PYTHON.format(python=sys.executable))
    python = str(cluster.folder / "my python")
    done = cluster.submit("my run.yaml", CONTAINER=container, MEGALONG_PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert cluster.node(1)["python"] == python


def test_a_container_without_the_checkout_is_told(cluster):
    """A container that shows nothing of the host, but for the image's own programs."""
    cluster._program("bin/srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$1" "$2" "$3" "/gone$4"\n')
    done = cluster.submit("my run.yaml", CONTAINER="c")
    assert done.returncode == 2
    assert done.stderr.startswith("megalong: error: slurm.container_mounts: the container does not show /gone")
    assert done.stderr.count("\n") == 1


def test_the_code_is_that_of_the_scripts_checkout(cluster, tmp_path):
    """Not what lies where the job runs, such as another checkout, nor what its environment has installed."""
    decoy = cluster.folder / "megalong"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('the decoy')")
    (cluster.folder / "slurm").unlink()
    common = f'set -euo pipefail\ncd -- "$SLURM_SUBMIT_DIR"\nsource {ROOT}/slurm/common.sh\ntrain_on_nodes "$@"\n'
    (tmp_path / "job.sh").write_text(common)
    done = cluster.submit("my run.yaml", script=tmp_path / "job.sh", PYTHONPATH="/other")
    assert done.returncode == 0, done.stderr
    assert (cluster.node(0)["path"], cluster.node(0)["safe"]) == (f"{ROOT}:/other", "1")
    assert cluster.node(0)["cwd"] == str(cluster.folder)
    assert str(ROOT / "slurm" / "rank.sh") in cluster.node(0)["words"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: sbatch slurm/pretrain.sbatch CONFIG.yaml"),
        (["absent.yaml"], "megalong: error: absent.yaml: no such configuration file"),
        (["my run.yaml", "run.sed=7"], "megalong: error: command line: run.sed: unknown key; did you mean seed?"),
        (["my run.yaml", "parallel.context_parallel_size=4"], "megalong: error: 16 processes cannot hold whole"),
        (["my run.yaml", "training.global_batch_size=3"], "global_batch_size 3 is not a multiple"),
        (
            ["my run.yaml", "model.load={hf: gone}"],
            "my run.yaml: model.load.hf gone: no such file or directory. The job",
        ),
        (["my run.yaml", "data.mixture=[{name: b, path: b, weight: 1}]"], "data.mixture b b: b.idx: no such file or d"),
    ],
)
def test_a_mistake_ends_the_job_before_any_node_starts(cluster, words, message):
    done = cluster.submit(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(cluster.notes.iterdir())


def test_a_preflight_that_fails_keeps_training_from_starting(cluster):
    done = cluster.submit("my run.yaml", PREFLIGHT_STATUS="2")
    assert done.returncode == 2
    assert "preflight failed: nothing was started" in done.stdout
    assert not (cluster.notes / "srun").exists()
    options = (cluster.notes / "preflight").read_text().splitlines()
    assert {"--ntasks-per-node=8", "--ntasks=16", "--cpus-per-task=12", "--kill-on-bad-exit=1"} <= set(options)


def test_it_may_be_left_out(cluster):
    assert cluster.submit("my run.yaml", "slurm.preflight=false").returncode == 0
    assert not (cluster.notes / "preflight").exists()


def test_a_job_is_requeued_by_its_marker_and_only_while_it_is_its_own(cluster):
    cluster.run_dir.mkdir(parents=True)
    assert cluster.submit("my run.yaml").returncode == 0
    assert not (cluster.notes / "requeue").exists()
    (cluster.run_dir / "REQUEUE").write_text('{"step": 7, "signal": "SIGUSR1"}')
    assert cluster.submit("my run.yaml", JOB_STATE="COMPLETING").returncode == 0
    assert not (cluster.notes / "requeue").exists()
    assert cluster.submit("my run.yaml").returncode == 0
    assert (cluster.notes / "requeue").read_text() == "requeue 812345\n"


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(cluster):
    cluster.run_dir.mkdir(parents=True)
    (cluster.run_dir / "REQUEUE").write_text('{"step": 7, "signal": "SIGUSR1"}')
    assert cluster.submit("my run.yaml").returncode == 0
    (cluster.notes / "requeue").unlink()
    again = cluster.submit("my run.yaml")
    assert again.returncode == 1
    assert "no step was done since the last requeue" in again.stdout
    assert not (cluster.notes / "requeue").exists()
    (cluster.run_dir / "REQUEUE").write_text('{"step": 8, "signal": "SIGUSR1"}')
    assert cluster.submit("my run.yaml").returncode == 0
    assert (cluster.notes / "requeue").exists()


def test_the_job_asks_for_the_recipes_256_gpus():
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=32", "--gpus-per-node=8", "--ntasks-per-node=1"} <= set(asked)
