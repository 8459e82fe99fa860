"""A SLURM that is false but for what it starts: `srun` runs each task on its node, which is one of the two hosts.

    batch script, on host a ── srun ──▶ this file ──▶ tests/network/hosts.py ──▶ the task, on host a or b

What SLURM tells a task of itself is in its environment. Of `srun`'s options those count that `slurm/common.sh` uses: a
task that fails ends the others. `scontrol` knows the nodes' names and addresses, and has nothing to requeue.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.network.hosts import NAMES, Hosts
from tests.network.runs import Run

ROOT = Path(__file__).parents[2]
JOB = "4711"
KILL_WAIT = 30.0  # seconds between SIGTERM and SIGKILL, by SLURM's own default
SCONTROL = """#!/bin/sh
case "$*" in
"show hostnames {names}") printf '%s\\n' {names} ;;
"--oneliner show node {first}") echo "NodeName={first} CPUTot=2 NodeAddr={address} NodeHostName={first} Port=6818" ;;
*) exit 1 ;;
esac
"""
# The script's python, which makes ready to stop what trains.
PYTHON = """#!{python}
import os, sys
if sys.argv[1:4] != ["-m", "megalong", "train"] or os.environ.get("RANK") != "1":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
from tests import ranks_preload
from tests.network.runs import pause_where_asked
pause_where_asked()
sys.exit(ranks_preload.megalong.cli.main(sys.argv[3:]))
"""


def submit(hosts: Hosts, run: Run, script: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a script of `slurm/` on host a, as SLURM starts a job of two nodes, and do not wait for it."""
    programs = run.folder / "bin"
    programs.mkdir(exist_ok=True)
    texts = {
        "srun": f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n',
        "scontrol": SCONTROL.format(names=" ".join(NAMES), first=NAMES[0], address=hosts.addresses[NAMES[0]]),
        "squeue": "#!/bin/sh\necho RUNNING\n",
        "python": PYTHON.format(python=sys.executable),
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": str(len(NAMES)),
        "SLURM_JOB_NODELIST": " ".join(NAMES),
        "SLURM_CPUS_PER_TASK": "2",
        "GPUS_PER_NODE": "0",
        "PROCESSES_PER_NODE": "1",
        "MEGALONG_PYTHON": str(programs / "python"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TEST_HOSTS": json.dumps({name: hosts.variables(name) for name in NAMES}),
        "TEST_FOLDER": str(run.folder),
    }
    return hosts.start(NAMES[0], ["bash", str(ROOT / "slurm" / script), str(run.config)], run.log, **job, **environment)


def srun(words: list[str]) -> int:
    """Run the tasks of one step; the greatest status."""
    options: dict[str, str] = {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        options[name] = value
    per_node = int(options.get("ntasks-per-node", "1"))
    tasks = int(options.get("ntasks", per_node * int(options["nodes"])))
    hosts = json.loads(os.environ["TEST_HOSTS"])
    started = [_start(words, options, hosts, rank, per_node, tasks) for rank in range(tasks)]
    killed_at: float | None = None
    while any(task.poll() is None for task in started):
        if options.get("kill-on-bad-exit") == "1" and any(task.poll() for task in started):
            if killed_at is None:
                killed_at = time.monotonic() + KILL_WAIT
                _tell(started, signal.SIGTERM)
            elif time.monotonic() > killed_at:
                _tell(started, signal.SIGKILL)
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in started)


def _tell(tasks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for task in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(task.pid, number)


def _start(
    words: list[str],
    options: dict[str, str],
    hosts: dict[str, dict[str, str]],
    rank: int,
    per_node: int,
    tasks: int,
) -> subprocess.Popen[bytes]:
    node = rank // per_node
    name = NAMES[node]
    told = {"SLURMD_NODENAME": name, "SLURM_NODEID": str(node), "SLURM_PROCID": str(rank)}
    told |= {"SLURM_LOCALID": str(rank % per_node), "SLURM_NTASKS": str(tasks)}
    enter = [sys.executable, str(Path(__file__).with_name("hosts.py"))]
    environment = {**os.environ, **hosts[name], **told}
    if "output" not in options:
        return subprocess.Popen([*enter, *words], env=environment, start_new_session=True)
    file = options["output"].replace("%n", str(node)).replace("%%", "%")
    with open(file, "ab" if options.get("open-mode") == "append" else "wb") as stream:
        return subprocess.Popen([*enter, *words], env=environment, stdout=stream, stderr=stream, start_new_session=True)


if __name__ == "__main__":
    sys.exit(srun(sys.argv[1:]))
