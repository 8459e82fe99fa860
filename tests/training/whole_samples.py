"""How micro-batches were cut when every rank read whole samples: what those of ranks that read less must equal.

Written apart from `megalong.model`: whole samples, padded, indexed by the tokens a rank holds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from megalong.attention.layout import TokenLayout, tokens_of


def cut(samples: list[Any], layout: TokenLayout, rank: int, masked: bool, multiple: int) -> dict[str, torch.Tensor]:
    """tokens, labels, loss_mask and positions [b, S/CP] of one rank."""
    rows = [_one(sample, layout, rank, masked, multiple) for sample in samples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _one(sample: Any, layout: TokenLayout, rank: int, masked: bool, multiple: int) -> dict[str, torch.Tensor]:
    tokens = np.asarray(sample.tokens)
    length = len(tokens) - 1
    step = math.lcm(layout.multiple, multiple)
    padded = -(-length // step) * step
    starts = [int(start) for start in sample.documents if start < length] if masked else [0]
    bounds = np.array(starts + ([length] if padded > length else []))
    own = tokens_of(layout.runs(padded, bounds)[rank])
    whole = np.zeros((4, padded), np.int64)  # tokens, labels, mask, positions
    whole[0, :length], whole[1, :length] = tokens[:-1], tokens[1:]
    for i in range(length):
        new_document = masked and i + 1 in set(sample.documents.tolist())
        target = sample.targets is None or bool(sample.targets[i + 1])
        whole[2, i] = i + 1 < sample.filled and not new_document and target
        whole[3, i] = i - max(start for start in starts if start <= i)
        if sample.positions is not None:
            whole[3, i] = sample.positions[i]
    names = ("tokens", "labels", "loss_mask", "positions")
    found = {name: torch.from_numpy(row[own]) for name, row in zip(names, whole, strict=True)}
    return {**found, "loss_mask": found["loss_mask"].float()}
