"""Compute a step a second time, to tell a hardware fault from a bug or bad data.

The same weights, random states and tokens give the same bits on sound hardware, NaN included, so a rank whose own loss
or gradient comes out otherwise computed wrongly once. Kernels that add up in no fixed order (atomics in some CUDA
backward passes) differ on their own: there only the loss is proof.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

Numbers = Sequence[Sequence[float]]


def compare(first: Numbers, second: Numbers) -> str:
    """What two computations of one step tell; each is rank by rank what that rank computed itself."""
    differ = [rank for rank, pair in enumerate(zip(first, second, strict=True)) if _bits(pair[0]) != _bits(pair[1])]
    if not differ:
        return "computed again it is the same, bit for bit: bad data, or a bug"
    return f"computed again it differs on rank {', '.join(map(str, differ))}: suspect its hardware"


def _bits(numbers: Sequence[float]) -> list[bytes | None]:
    # One NaN is as good as another: which bits it has tells where it came from, not what was computed.
    return [None if math.isnan(one) else struct.pack("<d", one) for one in numbers]
