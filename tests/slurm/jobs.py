"""How the tests submit the project's scripts and wait for them."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
# Two nodes without GPUs; the scripts' own figures are for nodes of eight.
OPTIONS = ("--nodes=2", "--cpus-per-task=2", "--gpus-per-node=0")


class Jobs:
    """Submits the project's scripts from the checkout, as a user does."""

    def __init__(self, cluster: Cluster, environment: dict[str, str], sources: Path) -> None:
        self.cluster, self.environment, self.sources = cluster, environment, sources

    def submit(self, script: str, *words: str, options: tuple[str, ...] = OPTIONS) -> str:
        output = f"--output={self.sources}/{Path(script).stem}-%A-%a.out"
        return self.cluster.sbatch(output, *options, f"slurm/{script}", *words, folder=ROOT, **self.environment)

    def told(self) -> str:
        """All jobs' output and the ends of their ranks' logs."""
        files = [*self.sources.glob("*.out"), *self.sources.glob("*/logs/*/*.log")]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-1500:]}" for file in sorted(files))

    def finish(self, job: str, seconds: float = 240) -> None:
        state = self.cluster.wait(job, seconds=seconds)
        assert state == "COMPLETED", f"job {job} is {state}\n{self.told()}"
