"""Health of a run: slow ranks, the cost of saving, and goodput.

All ranks end a step together, so the step time does not show who was slow. A rank's own time does: from the start of
its step, data loading included, to the moment its gradients are ready for the reduction over replicas. Until then it
has waited only for the ranks of its own replica, so a slow rank shows as a slow replica, and a rank with slow data
loading shows by itself.

    straggler: own seconds > 1.25 x m  and  > m + 5 sigma      m the (low) median of its pipeline stage's ranks,
                                                               sigma = 1.48 x their median deviation from m

Ranks are compared within their stage because stages are unequal by design (the last computes the loss). A straggler is
logged once it has been slow for three log intervals and one minute in a row: a hiccup is no straggler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import psutil
import torch
import torch.distributed as dist

from megalong.runtime.amounts import duration
from megalong.runtime.distributed import from_all_ranks, is_main_rank, place
from megalong.runtime.network import node_name
from megalong.training.ledger import Ledger

log = logging.getLogger("megalong")

SHARE = 1.25
SIGMAS = 5.0
IN_A_ROW = 3
LASTING_SECONDS = 60.0


class StepClock:
    """A rank's own seconds of a step: call `start`, then `compute` when its data is loaded, then `stop`."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
        self._began = self._loaded = self._stopped = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def start(self) -> None:
        """The step begins."""
        self._began = self._loaded = self._stopped = time.perf_counter()

    def compute(self) -> None:
        """Its data is loaded, and computation begins."""
        self._loaded = self._stopped = time.perf_counter()
        if self._cuda:
            # The host runs ahead of the GPU, so computation is timed on the GPU, without waiting for it.
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> None:
        """The gradients are ready for the reduction over replicas."""
        self._stopped = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Own seconds of the last step; waits until the GPU has computed them."""
        if self._events is None:
            return self._stopped - self._began
        first, last = self._events
        last.synchronize()
        return self._loaded - self._began + first.elapsed_time(last) / 1000


@dataclass(frozen=True)
class Health:
    """What rank 0 records at a logged step.

    Attributes:
        scalars: values by curve name.
        own_seconds: each rank's own seconds per step.
    """

    scalars: Mapping[str, float]
    own_seconds: Sequence[float]


class HealthWatch:
    """Watches one life of a run; all ranks call `report` together."""

    def __init__(self, run: Path, step: int) -> None:
        """`step`: the step from which the run continues."""
        ranks: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(ranks, (node_name(), place().stage))
        self._nodes, self._stages = [node for node, _ in ranks], [stage for _, stage in ranks]
        self._in_a_row = [0] * len(ranks)
        self._since = [0.0] * len(ranks)
        self._slow: tuple[int, ...] = ()
        self._ledger = Ledger(run, step, psutil.Process().create_time()) if is_main_rank() else None

    def report(
        self, step: int, steps: int, seconds: Mapping[str, float], own: float, useful: float, skipped: int, write: bool
    ) -> Health | None:
        """Gather all ranks' times, log new stragglers and update the ledger; collective.

        Args:
            steps: since the last report; `seconds` (by activity), `own` and `useful` are sums over them.
            own: this rank's own seconds.
            useful: seconds of the steps that were applied.
            skipped: number of steps that were not.
            write: log the health line, and write the ledger to disk.

        Returns:
            What to plot, on rank 0; None elsewhere.
        """
        found = from_all_ranks([own / max(steps, 1), seconds.get("data", 0.0) / max(steps, 1)])
        if self._ledger is None:
            return None
        owns = [one for one, _ in found]
        middle = [median_low([owns[r] for r in range(len(owns)) if self._stages[r] == stage]) for stage in self._stages]
        self._log_stragglers(owns, middle, [data for _, data in found])
        pause = seconds.get("checkpoint", 0.0)
        self._ledger.add(step, useful, pause, skipped)
        self._ledger.write(at_once=write)
        worst = max(range(len(owns)), key=lambda rank: owns[rank] / max(middle[rank], 1e-9))
        ratio = owns[worst] / max(middle[worst], 1e-9)
        if write:
            log.info("%s", self._line(worst, ratio))
        return Health(self._scalars(owns, worst, ratio), owns)

    def end(self) -> None:
        """Count the time since the last report, such as the last save, and write the ledger."""
        if self._ledger is not None:
            self._ledger.beat()
            self._ledger.write()

    def _scalars(self, owns: Sequence[float], worst: int, ratio: float) -> dict[str, float]:
        assert self._ledger is not None
        book = self._ledger.book
        return {
            "goodput": self._ledger.goodput,
            "restarts": self._ledger.restarts,
            "skipped_steps": book.skipped,
            "checkpoint_pause_s": book.pauses,
            "own_step_s_slowest": max(owns),
            "own_step_s_median": median_low(owns),
            "slowest_rank": worst,
            "slowest_to_median": ratio,
            "stragglers": len(self._slow),
        }

    def _line(self, worst: int, ratio: float) -> str:
        assert self._ledger is not None
        ledger, parts = self._ledger, []
        parts.append(f"goodput {100 * ledger.goodput:.1f} % of {duration(ledger.wall)}")
        waited = f" (and {duration(ledger.waited)} waiting between them)" if ledger.restarts else ""
        parts.append(f"restarts {ledger.restarts}{waited}")
        parts.append(f"skipped steps {ledger.book.skipped}")
        parts.append(f"checkpoint pauses {ledger.book.pauses:.1f} s")
        if len(self._nodes) > 1:
            parts.append(f"slowest rank {worst} on {self._nodes[worst]}, {ratio:.2f} x the median")
        return "health: " + " | ".join(parts)

    def _log_stragglers(self, owns: Sequence[float], middle: Sequence[float], data: Sequence[float]) -> None:
        now, moment = stragglers(owns, self._stages), time.monotonic()
        for rank in range(len(owns)):
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if rank in now else 0
            if self._in_a_row[rank] <= 1:
                self._since[rank] = moment
        lasting = [moment - since >= LASTING_SECONDS for since in self._since]
        slow = tuple(rank for rank, times in enumerate(self._in_a_row) if times >= IN_A_ROW and lasting[rank])
        if slow and slow != self._slow:
            worst = max(slow, key=lambda rank: owns[rank])
            nodes = ", ".join(dict.fromkeys(self._nodes[rank] for rank in slow))
            log.warning(
                "straggler: rank %s on %s takes %.2f s for its part of a step (%.2f s of it reading data), the median "
                "rank %.2f s, for %d log intervals in a row",
                ", ".join(map(str, slow)) if len(slow) < 9 else f"{slow[0]} and {len(slow) - 1} more",
                nodes,
                owns[worst],
                data[worst],
                middle[worst],
                IN_A_ROW,
            )
        self._slow = slow


def stragglers(seconds: Sequence[float], stages: Sequence[int]) -> list[int]:
    """Ranks that are slow compared with their own pipeline stage, by the rule above."""
    slow = []
    for stage in set(stages):
        ranks = [rank for rank, its in enumerate(stages) if its == stage]
        middle = median_low([seconds[rank] for rank in ranks])
        sigma = 1.4826 * median_low([abs(seconds[rank] - middle) for rank in ranks])
        slow += [rank for rank in ranks if seconds[rank] > max(SHARE * middle, middle + SIGMAS * sigma)]
    return sorted(slow)
