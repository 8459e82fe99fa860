"""Other programs that a step runs."""

from __future__ import annotations

import subprocess
import sys

from tests.gpu.harness import ROOT, Trial


def megalong(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it; what it says goes to the log as well."""
    command = [sys.executable, "-m", "megalong", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"$ megalong {' '.join(arguments)}\n{done.stdout}{done.stderr}", flush=True)
    return done


def pytest(trial: Trial, *arguments: str) -> None:
    """Tests of this folder; all must pass, and in a rehearsal be skipped for want of a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    trial.figure("tests", last, headline=True)
    trial.check("no test failed", done.returncode == 0, last)
    if trial.rehearse:
        skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
        trial.check("each skip says why", bool(skipped) and all("needs an NVIDIA GPU" in line for line in skipped))
    else:
        trial.check("tests ran", " passed" in last, last)
