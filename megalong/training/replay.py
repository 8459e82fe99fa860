"""Compute a step a second time, to distinguish a hardware fault from a bug or bad data.

On sound hardware the same weights, random states and tokens give the same bits, NaN included, so a rank whose own loss
or gradient differs has computed wrongly once. Kernels that sum in no fixed order (atomics in some CUDA backward passes)
differ without a fault: there only the loss is proof.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

Numbers = Sequence[Sequence[float]]


def compare(first: Numbers, second: Numbers) -> str:
    """Compare two computations of one step, each given as every rank's own numbers."""
    differ = [rank for rank, pair in enumerate(zip(first, second, strict=True)) if _bits(pair[0]) != _bits(pair[1])]
    if not differ:
        return "recomputed, it is the same, bit for bit: bad data, or a bug"
    return f"recomputed, it differs on rank {', '.join(map(str, differ))}: suspect its hardware"


def _bits(numbers: Sequence[float]) -> list[bytes | None]:
    # All NaNs are equal: their bits show where they came from, not what was computed.
    return [None if math.isnan(one) else struct.pack("<d", one) for one in numbers]
