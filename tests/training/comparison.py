"""How far a run is from another: one number, so that a test can say both "equal" and "caught"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Steps = Mapping[str, Sequence[float]]

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def deviation(ranks: Sequence[Steps], reference: Steps) -> float:
    """The largest relative difference of any rank's loss or gradient norm at any step from the reference's.

    A number that is not finite counts as infinitely far.
    """
    return max(
        _relative(ours, theirs)
        for rank in ranks
        for figure in ("loss", "norm")
        for ours, theirs in zip(rank[figure], reference[figure], strict=True)
    )


def _relative(ours: float, theirs: float) -> float:
    difference = abs(ours - theirs) / abs(theirs)
    return math.inf if math.isnan(difference) else difference
