"""Runs steps one after the other, each in a process of its own with a time limit, and says at once what they find.

A step reports figures and checks as they come; each is a line of JSON on stdout and, where $OUT names a folder, in
$OUT/first_run.jsonl. So a run that is cut off has said all it knew. What steps print goes to a log, of which the end is
shown where one fails. The table at the end has a line for each step:

    passed, failed (a check or an exception), timed out, skipped (named: by budget, or for want of a package)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

from benchmarks.gpu.child import TIMED_OUT, Line, python, reporter, run_child  # noqa: E402

from megalong.runtime.gpus import missing_settings  # noqa: E402

PATIENCE, GRACE = 2.0, 30.0  # a step is killed after its estimate times the one plus the other, in seconds
LOG_LINES = 25  # of a step that failed


class SkipStep(Exception):
    """Something that the step needs is not here; the message says what."""


@dataclass(frozen=True)
class Step:
    """What is run in a process of its own, for about so many seconds: `target` names a function that takes a trial."""

    name: str
    seconds: float
    about: str
    target: str = ""

    @property
    def limit(self) -> float:
        """Seconds after which it is killed."""
        return PATIENCE * self.seconds + GRACE

    def run(self, trial: Trial) -> None:
        """Call the target, by default `run` of the step's module."""
        module, _, function = self.target.partition(":")
        getattr(importlib.import_module(module or f"tests.gpu.steps.{self.name}"), function or "run")(trial)


@dataclass
class Trial:
    """A step at work: at which sizes, and where its findings go.

    `rehearse`: on the CPU, at tiny sizes, so that wrong arguments show without a GPU. What only a GPU can tell is None.
    """

    rehearse: bool
    report: Callable[[Line], None]
    failures: list[str] = field(default_factory=list)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where it works."""
        import torch

        if self.rehearse:
            return torch.device("cpu")
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)

    def size(self, real: int, rehearsed: int) -> int:
        """The one or the other."""
        return rehearsed if self.rehearse else real

    def figure(self, name: str, value: Any, headline: bool = False) -> None:
        """Say what was found; the table at the end shows headlines."""
        if isinstance(value, float):
            value = float(f"{value:.4g}") if math.isfinite(value) else str(value)
        self.report({"figure": name, "value": value, **({"headline": True} if headline else {})})

    def check(self, name: str, holds: bool, why: str = "") -> None:
        """Say whether something is as it must be; a step with a check that is not has failed."""
        self.report({"check": name, "passed": bool(holds), **({"why": why} if why and not holds else {})})
        if not holds:
            self.failures.append(f"{name}: {why}" if why else name)

    def near(self, name: str, errors: Mapping[str, float], most: float | Mapping[str, float]) -> None:
        """Relative errors by what they are of, and their bounds; NaN is over every bound."""
        bounds = dict.fromkeys(errors, most) if isinstance(most, float) else most
        over = [
            f"{of} off by {error:.1e}, over {bounds[of]:g}" for of, error in errors.items() if not error <= bounds[of]
        ]
        self.report({"check": name, "passed": not over, "errors": {of: f"{e:.1e}" for of, e in errors.items()}})
        if over:
            self.failures.append(f"{name}: {', '.join(over)}")

    def seconds(self, work: Callable[[], Any], budget: float = 1.0) -> float | None:
        """Median time of `work` on the GPU; None in a rehearsal, after one call."""
        if self.rehearse:
            work()
            return None
        from benchmarks.gpu.device import median_time

        return median_time(work, self.device, budget)

    def rate(self, name: str, work: Callable[[], Any], flops: float, headline: bool = False) -> None:
        """TFLOP/s of `work`."""
        took = self.seconds(work)
        self.figure(name, None if took is None else flops / took / 1e12, headline)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step that may fail by itself: the others are tried all the same."""
        try:
            yield
        except SkipStep as error:
            self.report({"part": name, "skipped": str(error)})
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


@dataclass
class Outcome:
    """How a step ended."""

    step: Step
    status: str
    seconds: float = 0.0
    why: str = ""
    headlines: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return self.status in ("failed", "timed out")


@dataclass
class Harness:
    """`entry`: arguments of the interpreter that run one step, to which its name and a descriptor are added."""

    entry: Sequence[str]
    seconds: float = math.inf
    rehearse: bool = False

    def __post_init__(self) -> None:
        out = os.environ.get("OUT")
        self.folder = Path(out) if out else Path(tempfile.mkdtemp(prefix="first-run-"))
        self.started = time.monotonic()

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """All steps that there is time for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        outcomes = []
        with open(self.folder / "first_run.jsonl", "w") as self.lines:
            for step in steps:
                outcomes.append(self._step(step))
                ended = outcomes[-1]
                self._say({"step": step.name, "status": ended.status, "seconds": ended.seconds, "why": ended.why})
        return outcomes

    def _step(self, step: Step) -> Outcome:
        left = self.seconds - (time.monotonic() - self.started)
        if step.seconds > left:
            return Outcome(step, "skipped", why=f"{step.seconds:.0f} s no longer fit into the budget")
        found = Outcome(step, "passed")
        failures: list[str] = []

        def take(line: Line) -> None:
            self._say({"step": step.name, **line})
            if line.get("headline") and line["value"] is not None:
                found.headlines.append(f"{line['figure']} {line['value']}")
            failures.extend(line.get("failures", ()))
            if "skip" in line:
                found.status, found.why = "skipped", line["skip"]

        log, started = self.folder / "first_run.log", time.monotonic()
        arguments = [*self.entry, "--step", step.name, *(["--rehearse"] if self.rehearse else []), "--report-to"]
        with open(log, "ab") as output:
            begins = output.tell()
            status = run_child(python(arguments), min(step.limit, left), take, output, _environment())
        found.seconds = round(time.monotonic() - started, 1)
        if status == TIMED_OUT:
            found.status, found.why = "timed out", f"no end after {min(step.limit, left):.0f} s"
        elif status:
            found.status, found.why = "failed", "; ".join(failures) or f"exit status {status}"
        if found.is_bad:
            self._show_log(log, begins)
        return found

    def _say(self, line: Line) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        print(text, file=self.lines, flush=True)

    def _show_log(self, log: Path, begins: int) -> None:
        with open(log, "rb") as file:
            file.seek(begins)
            lines = file.read().decode(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-LOG_LINES:]), flush=True)


def run_step(step: Step, rehearse: bool, descriptor: int) -> int:
    """In the step's own process: run it and report; its exit status."""
    report = reporter(descriptor)
    trial = Trial(rehearse, report)
    try:
        step.run(trial)
    except SkipStep as error:
        report({"skip": str(error)})
        return 0
    except Exception as error:
        traceback.print_exc()
        told = str(error).strip().splitlines()
        trial.failures.append(f"{type(error).__name__}: {told[0][:200] if told else ''}")
    if trial.failures:
        report({"failures": trial.failures})
    return 1 if trial.failures else 0


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each step: how it ended, seconds beside the estimate, what it found."""
    lines = [f"{'step':14}{'':11}{'s':>7} {'(est.)':>7}  what it found"]
    for one in outcomes:
        told = one.why if one.status != "passed" else ", ".join(one.headlines)
        lines.append(f"{one.step.name:14}{one.status:11}{one.seconds:7.1f} {f'({one.step.seconds:.0f})':>7}  {told}")
    return "\n".join(lines)


def _environment() -> dict[str, str]:
    """What a run sets for itself, before it imports torch."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**missing_settings(os.environ), **os.environ, "PYTHONPATH": path}
