"""What a rank is given of a sample: padding that counts for nothing, angles that are computed once."""

from __future__ import annotations

import pytest

from tests.pool import WorkerPool


@pytest.mark.parametrize(("tokens", "ranks", "length"), [(1, 2, 2), (5, 4, 2), (16, 2, 8), (17, 2, 10)])
def test_padding_is_not_counted_and_lies_within_the_sample(
    tokens: int, ranks: int, length: int, pool: WorkerPool
) -> None:
    """A sample of one token on two ranks is padded to four: more padding than tokens."""
    (found,) = pool.run(1, "tests.model.workers:padded_shard", tokens, ranks)
    assert found["counted"] == tokens
    assert found["lengths"] == {length}
    assert found["positions"] == tokens - 1


def test_all_layers_share_the_angles(pool: WorkerPool) -> None:
    (found,) = pool.run(1, "tests.model.workers:padded_shard", 16, 2)
    assert found["made"] == 1
