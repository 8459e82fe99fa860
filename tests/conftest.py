"""Fixtures every folder of tests may use."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import WorkerPool

TESTS = Path(__file__).parent


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start: what a shell runs in the background ignores it, and so do its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest (`--durations=0`), longest first: started last, one of them would keep a core alone at the
# end. The others follow in their own order.
LONGEST = (
    "training/test_resume.py",
    "data/test_restart.py",
    "training/test_saving.py",
    "training/test_parity.py",
    "training/test_guard.py",
    "network/test_cut.py",
    "checkpoint/test_data_only.py",
    "training/test_documents.py",
    "training/test_resume_settings.py",
    "attention/test_exchange.py",
    "checkpoint/test_damage.py",
    "checkpoint/test_damage_at_start.py",
    "training/test_stages.py",
    "training/test_signals.py",
    "training/test_fp8.py",
    "training/test_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the order within a file stays."""
    place = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


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
