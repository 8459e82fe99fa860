"""What a rank is given of a sample: padding that counts for nothing, angles that are computed once."""

from __future__ import annotations

import numpy as np
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


def test_given_positions_and_targets_travel_with_their_tokens(pool: WorkerPool) -> None:
    """Two context-parallel ranks together hold each token's own position, and count the tokens that are targets."""
    results = [pool.run(1, "tests.model.workers:given_shard", rank) for rank in range(2)]
    tokens, positions, mask = (np.concatenate([r[0][i] for r in results], axis=1) for i in range(3))
    order = np.argsort(tokens, axis=1)  # token i of a row is i
    assert np.take_along_axis(positions, order, 1).tolist() == [[*range(4), *range(104, 108)], [*range(8)]]
    # Targets are tokens 3 and 4 of the first row, 8 of the second: they count at the token before.
    assert np.take_along_axis(mask, order, 1).tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
