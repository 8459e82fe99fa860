"""A rank's share of whole samples that a test has at hand as tensors, also fake ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megalong.attention.layout import TokenLayout
from megalong.batches.context_shard import ContextShard, read_spans
from megalong.batches.micro_batch import MicroBatch, batch_of, sequences_of
from megalong.data.samples.sample import Sample


def shard_samples(
    samples: torch.Tensor,
    layout: TokenLayout,
    context_rank: int,
    device: torch.device | None = None,
    documents: Sequence[np.ndarray] | None = None,
    multiple: int = 1,
    filled: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> MicroBatch:
    """Cut a rank's share out of whole samples.

    Args:
        samples: int64 [b, S+1] token ids, the same on every rank of the context-parallel group.
        layout: how tokens lie on context-parallel ranks.
        context_rank: this rank's index in the context-parallel group.
        documents: for each row the tokens of the sample at which a document begins, int64 ascending from 0; None:
            every token sees all before it.
        multiple: what the padded length must be a multiple of besides `layout.multiple`.
        filled: for each row how many of its S+1 tokens are documents'; the rest is padding, which is no target. None:
            all of them. Where documents are given, padding begins as one of them.
        positions: int64 [b, S] of the tokens read; None: places in the document, or in the sample.
        targets: bool [b, S+1]: the tokens that count when they are predicted; None: all.
        weights: float32 [b, 2, S+1], as `Sample` has them; None: every target weighs 1.
    """
    length = samples.shape[1] - 1
    unread = np.broadcast_to(np.int64(0), length + 1)  # tokens stay the tensors they are: a dry run's are fake
    rows = [
        Sample(
            unread,
            np.zeros(1, np.int64) if documents is None else documents[row],
            length + 1 if filled is None else filled[row],
            None if positions is None else positions[row].numpy(),
            None if targets is None else targets[row].numpy(),
            None if weights is None else weights[row].numpy(),
        )
        for row in range(len(samples))
    ]
    share = ContextShard(layout, context_rank, documents is not None, multiple)
    plan = share.plan(rows)
    own = [
        torch.cat([row[:0], *(row[first:stop] for first, stop in read_spans(share.runs(sequence), length))])
        for row, sequence in zip(samples, sequences_of(plan, rows), strict=True)
    ]
    return batch_of(rows, share, plan, own).to(device)
