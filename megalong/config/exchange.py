"""Choose the context-parallel exchange: check the configured one, or resolve `auto` and give the reason.

Bytes and FLOPs of one ring step decide. A rank with s tokens, h query and g key heads of d channels computes 2 s² h d
FLOPs a step (half of s x s, two products) and sends 4 s g d bytes in bf16, which is s h / (2 g) FLOPs per byte. An H100
at 600 TFLOP/s with a network of 50 GB/s needs 12,000 FLOPs per byte: above, messages overlap with compute and the ring
costs nothing. Below, ulysses sends (2 h + 2 g) s d once instead of 2 g s d at every step. If the heads do not divide,
all keys are gathered, which is affordable for such short sequences.

UltraLong at 1M: TP 8, CP 4, so s = 262144, h = 4, g = 1: 524,288 FLOPs per byte, ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalong.errors import UserError

RING_FLOPS_PER_BYTE = 12_000


@dataclass(frozen=True)
class Exchange:
    """Groups of `heads_size` neighbouring ranks swap tokens for heads; keys travel between groups by `transport`."""

    name: str
    heads_size: int
    transport: Literal["ring", "all_gather"]
    reason: str


def choose_exchange(
    wanted: str, ulysses_size: int | None, ranks: int, tokens: int, heads: int, groups: int, copies_keys: bool = True
) -> Exchange:
    """Resolve `attention.exchange`.

    Args:
        wanted: auto, ring, all_gather, ulysses or ring_ulysses.
        ulysses_size: ranks that share heads under ring_ulysses; None: as many as the heads allow, but fewer than all.
        ranks: context-parallel size.
        tokens: of a sequence on one rank.
        heads, groups: query and key heads on one tensor-parallel rank.
        copies_keys: whether a key head may be copied to several ranks, which Transformer Engine does not support.

    Raises:
        UserError: the heads cannot be shared as configured.
    """
    if ranks == 1:
        return Exchange("none", 1, "ring", "one context-parallel rank has the whole sequence")
    shares = [
        size
        for size in range(2, ranks + 1)
        if ranks % size == 0 and heads_can_be_shared(heads, groups, size) and (copies_keys or groups % size == 0)
    ]
    if wanted == "auto":
        return _best(ranks, tokens, heads, groups, shares)
    if wanted in ("ring", "all_gather"):
        return Exchange(wanted, 1, "ring" if wanted == "ring" else "all_gather", "as configured")
    size = ranks if wanted == "ulysses" else ulysses_size or max((n for n in shares if n < ranks), default=0)
    if size not in shares:
        _refuse(wanted, size, ranks, heads, groups, shares)
    return Exchange(wanted, size, "ring", "as configured")


def heads_can_be_shared(heads: int, groups: int, ranks: int) -> bool:
    """Whether `ranks` ranks can each get the same number of query heads, in whole groups or as parts of one group."""
    return heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)


def _best(ranks: int, tokens: int, heads: int, groups: int, shares: list[int]) -> Exchange:
    intensity = tokens * heads / (2 * groups)
    if intensity >= RING_FLOPS_PER_BYTE:
        return Exchange(
            "ring", 1, "ring", f"{intensity:,.0f} FLOPs per byte sent: the ring's messages overlap with compute"
        )
    short = f"{intensity:,.0f} FLOPs per byte sent are too few to overlap a ring's messages with compute"
    if ranks in shares:
        return Exchange("ulysses", ranks, "ring", f"{short}, and {ranks} ranks can share {heads} heads")
    if shares:
        size = max(shares)
        return Exchange("ring_ulysses", size, "ring", f"{short}, and {size} of {ranks} ranks can share {heads} heads")
    return Exchange("all_gather", 1, "all_gather", f"{short}, and {heads} heads do not divide by {ranks} ranks")


def _refuse(wanted: str, size: int, ranks: int, heads: int, groups: int, shares: list[int]) -> None:
    possible = [n for n in shares if n < ranks] if wanted == "ring_ulysses" else []
    fix = f"attention.ulysses_size {' or '.join(map(str, possible))}" if possible else "attention.exchange: ring"
    what = f"groups of {size}" if size else "groups of ranks"
    raise UserError(
        f"attention.exchange {wanted}: {what} within {ranks} context-parallel ranks cannot share {heads} query and "
        f"{groups} key heads per tensor-parallel rank (they must divide evenly); write {fix}"
    )
