"""Fixtures every folder of tests may use."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import WorkerPool
from tests.tiers import THIRDS, Change, current_change, slow_files, taken

TESTS = Path(__file__).parent
# Folders whose tests have the machine's network, or a cluster, to themselves.
ALONE = ("network", "slurm")
_CHANGE = pytest.StashKey[Change]()
_IN_TURN = pytest.StashKey[dict[Path, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--in-turn`."""
    parser.addoption(
        "--in-turn",
        action="store_true",
        help="of the slow tests, run those that the change may touch and a third of the others (see tests/tiers.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C reach what the tests start: what a shell runs in the background ignores it, and so do its children.

    And choose the files of slow tests whose turn it is.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    change = current_change() if config.getoption("in_turn") else None
    if change is not None:
        config.stash[_CHANGE] = change
        config.stash[_IN_TURN] = taken(slow_files(), change)


# The files that take longest (`--durations=0`), longest first: started last, one of them would keep a core alone at the
# end. The others follow in their own order.
LONGEST = (
    "training/test_parity.py",
    "training/test_guard.py",
    "data/corpus/test_restart.py",
    "training/test_lora.py",
    "training/test_resume.py",
    "training/test_saving.py",
    "training/test_killed.py",
    "training/test_processes.py",
    "training/test_documents.py",
    "training/test_matrix.py",
    "training/test_resume_layouts.py",
    "checkpoint/test_optimizer_state.py",
    "data/corpus/test_preprocess.py",
    "data/corpus/test_encoder.py",
    "network/test_cut.py",
    "training/test_fp8.py",
    "sft/test_training.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files that take longest first, the order within a file staying, and say what must not run side by side.

    Processes of pytest-xdist take one group at a time: a file, or all files of a folder in ALONE.
    """
    place = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        folder, name = item.path.parent.name, str(item.path.relative_to(TESTS))
        item.add_marker(pytest.mark.xdist_group(folder if folder in ALONE else name))
    kept = config.stash.get(_IN_TURN, None)
    if kept is not None:
        dropped = [item for item in items if item.get_closest_marker("slow") and item.path not in kept]
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=dropped)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which slow tests were chosen, and why."""
    if not config.getoption("in_turn"):
        return []
    change = config.stash.get(_CHANGE, None)
    if change is None:
        return ["slow tests: all, since git does not say what has changed"]
    kept = config.stash[_IN_TURN]
    told = [f"  {why:8} {path.relative_to(TESTS)}" for path, why in kept.items()]
    return [
        f"slow tests of {len(kept)} files; changes since {change.since}, third {change.turn + 1} of {THIRDS}:",
        *told,
    ]


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for distributed tests, shared by the whole session (see tests/pool.py)."""
    with WorkerPool() as workers:
        yield workers


@pytest.fixture
def megalong_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What our logger says from INFO on, also after a command in this process has cut it off from the root logger."""
    logger = logging.getLogger("megalong")
    if caplog.handler not in logger.handlers:  # pytest adds it to loggers that are cut off already
        monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "megalong")
    return caplog
