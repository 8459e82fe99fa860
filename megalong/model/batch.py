"""A micro-batch as one rank sees it, and what of it travels to the attention layers.

A packed sample holds S+1 tokens: the first S are read, the last S are to be predicted. Context parallelism gives each
rank S/CP of them, in the order its `ZigzagLayout` says; the positions say which ones they are. Everything downstream
(rotary angles, loss by position, and the ring) relies on these explicit positions and never on the index in the shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megalong.attention.layout import ZigzagLayout
from megalong.rope import cos_sin


@dataclass
class AttentionInputs(PackedSeqParams):
    """Positions of this rank's tokens, on the way to core attention.

    Megatron-Core hands `packed_seq_params` through recomputation and to the layers of every pipeline stage, which it
    does not do for `position_ids`; module state would not do, because several micro-batches are in flight at once.
    `qkv_format="sbhd"` tells it that nothing is packed as far as its own code is concerned.
    """

    qkv_format: str = "sbhd"
    positions: torch.Tensor | None = None
    _rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def rotary(self, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [local sequence, head_dim / 2] float32: made by the first layer, shared by the others."""
        key = id(inverse_frequencies)
        if key not in self._rotary:
            assert self.positions is not None
            self._rotary[key] = cos_sin(inverse_frequencies, self.positions)
        return self._rotary[key]


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of a micro-batch.

    Shapes: tokens, labels int64 [batch, S/CP]; loss_mask float32 [batch, S/CP] (1 where the label counts);
    positions int64 [S/CP].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor

    def attention_inputs(self) -> AttentionInputs:
        """What core attention needs to know of this micro-batch."""
        return AttentionInputs(positions=self.positions)


def shard_samples(
    samples: torch.Tensor, layout: ZigzagLayout, context_rank: int, device: torch.device | None = None
) -> MicroBatch:
    """Cut a rank's share out of whole samples.

    Args:
        samples: int64 [batch, S+1] token ids, the same on every rank of the context-parallel group.
        layout: how tokens lie on context-parallel ranks.
        context_rank: this rank's index in the context-parallel group.
    """
    sequence = samples.shape[1] - 1
    indices = layout.indices(sequence, context_rank)
    tokens = samples[:, indices].to(device)
    labels = samples[:, indices + 1].to(device)
    mask = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    return MicroBatch(tokens, labels, mask, indices.to(device))
