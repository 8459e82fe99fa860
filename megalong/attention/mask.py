"""Which keys of a block its queries see: all keys, or those between two diagonals.

A block is a run of consecutive queries against a run of consecutive keys. Causality, the start of a document and a
sliding window all cut it along diagonals: query i sees key j if `i + lower <= j <= i + upper`.

    causal, q and k the same tokens      upper  0
    causal, keys begin 3 tokens earlier  upper  3
    window of 2, the same tokens         upper  0, lower -1          key   0 1 2 3
                                                             query 0       x . . .
                                                                   1       x x . .
                                                                   2       . x x .
                                                                   3       . . x x

A query may see no key of a block; then its result there is 0 and its log-sum-exp is -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockMask:
    """Diagonals of a block; None for no cut."""

    upper: int | None = None
    lower: int | None = None

    def keys_of(self, rows: range, keys: int) -> range:
        """Those of `keys` keys that at least one of the queries `rows` may see; may be empty."""
        first = 0 if self.lower is None else max(0, rows.start + self.lower)
        last = keys if self.upper is None else min(keys, rows.stop + self.upper)
        return range(min(first, keys), max(min(first, keys), last))

    def hidden(self, rows: range, keys: range, device: torch.device) -> torch.Tensor | None:
        """Bool `[rows, keys]`, true where a query must not see a key; None if all are seen."""
        cut_above = self.upper is not None and keys.stop - 1 > rows.start + self.upper
        cut_below = self.lower is not None and keys.start < rows.stop - 1 + self.lower
        if not (cut_above or cut_below):
            return None
        distance = torch.arange(keys.start, keys.stop, device=device) - torch.arange(
            rows.start, rows.stop, device=device
        ).unsqueeze(1)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.upper is not None:
            hidden |= distance > self.upper
        if self.lower is not None:
            hidden |= distance < self.lower
        return hidden


FULL = BlockMask()
CAUSAL = BlockMask(upper=0)
