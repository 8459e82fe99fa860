"""Fixtures every folder of tests may use."""

import signal
from collections.abc import Iterator

import pytest

from tests.pool import WorkerPool


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start: what a shell runs in the background ignores it, and so do its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for distributed tests, shared by the whole session (see tests/pool.py)."""
    with WorkerPool() as workers:
        yield workers
