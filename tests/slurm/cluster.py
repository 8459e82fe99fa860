"""A real SLURM of two nodes on this machine, in a folder of its own: no systemd, nothing of the machine's changed.

    with Cluster(folder) as cluster:
        job = cluster.sbatch("slurm/pretrain.sbatch", "run.yaml")
        cluster.wait(job)

munged, slurmctld and a slurmd for each node run as root in the foreground, as children of this process: stopping is
ending children, and nothing outlives the folder. Key, sockets, spool and logs lie in the folder; ports are free ones.
SLURM lets a requeued job start only once its old credential has expired, 120 s by default: here 10.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

NODES = ("n0", "n1")
CPUS = 2
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
# Debian keeps daemons where only root's PATH looks.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=5
MessageTimeout=30
SlurmdParameters=config_overrides
MailProg=/bin/true
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000\n"
)
PARTITION = "PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP\n"


def missing() -> str | None:
    """Why no SLURM can be started here, None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons start jobs as root only"
    return None


class Cluster:
    """Two idle nodes once entered; leaving ends every daemon and every job."""

    def __init__(self, folder: Path | None = None) -> None:
        # A path of a socket holds a hundred characters: pytest's folders are often longer.
        self.folder = folder or Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs: this process's environment without another SLURM's, and with ours."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**kept, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._write_files()
            self._start("munged", "--foreground", "--force", "--num-threads=2", *self._munge_files())
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged to listen")
            self._start("slurmctld", "-D", "-i")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name)
            self._until(lambda: self._states() == ["idle"] * len(NODES), "both nodes to be idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *words: str, check: bool = True, **environment: str) -> str:
        """The output of a command such as `squeue`."""
        done = subprocess.run(
            words, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def sbatch(self, *words: str, folder: Path | None = None, **environment: str) -> str:
        """Submit from `folder`, and answer with the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            cwd=folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(words)}: {done.stderr}")
        return done.stdout.strip().split(";")[0]

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, … as SLURM says it, for an array all its tasks' states in a set's order."""
        shown = self.run("scontrol", "-o", "show", "job", job)
        return " ".join(sorted({word[9:] for word in shown.split() if word.startswith("JobState=")}))

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        shown = self.run("scontrol", "-o", "show", "job", job)
        return int(next(word for word in shown.split() if word.startswith("Restarts=")).partition("=")[2])

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """Wait until the job is in one of `states`, where none is given until it has ended; returns its state."""
        ended = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._until(lambda: self.state(job) in ended, f"job {job} to be {' or '.join(ended)}", seconds)
        return self.state(job)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failed test's message."""
        return "\n".join(
            f"== {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:])
            for file in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        """End jobs, then daemons, and remove the folder."""
        if len(self._daemons) > 1:
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            self._quietly(lambda: not self.run("squeue", "-h", check=False), 10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        text = CONF.format(host=host, folder=self.folder, ports=ports)
        for name, port in zip(NODES, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=CPUS)
        (self.folder / "slurm.conf").write_text(text + PARTITION.format(nodes=",".join(NODES)))

    def _munge_files(self) -> list[str]:
        names = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{ending}" for option, ending in names.items()]

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}-{len(self._daemons)}.out.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split()

    def _until(self, happened, what: str, seconds: float = 60) -> None:
        if not self._quietly(happened, seconds):
            raise TimeoutError(f"waited {seconds:g} s for {what}\n{self.run('squeue', check=False)}\n{self.logs()}")

    def _quietly(self, happened, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return True
            time.sleep(0.3)
        return False


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
