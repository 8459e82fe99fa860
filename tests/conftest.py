"""Fixtures every folder of tests may use."""

from collections.abc import Iterator

import pytest

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for distributed tests, shared by the whole session (see tests/pool.py)."""
    with WorkerPool() as workers:
        yield workers
