"""What the attention layers need of a micro-batch: its positions, and the plan of which token sees which."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megalong.attention.plan import AttentionPlan
from megalong.batches.micro_batch import MicroBatch
from megalong.model.kv_cache import KVCache
from megalong.rope import cos_sin


@dataclass
class AttentionInputs(PackedSeqParams):
    """Positions of this rank's tokens and the plan of their attention, passed to core attention as `packed_seq_params`.

    Megatron-Core passes `packed_seq_params`, unlike `position_ids`, through recomputation and to the layers of every
    pipeline stage. Module state would not work, because several micro-batches are in flight at once.
    `qkv_format="sbhd"` tells Megatron-Core that nothing is packed as far as its own code is concerned.

    `positions` int64 [1 or b, s], one row if all rows are alike. With a `cache` (generation) the tokens belong to a
    single document and follow those in the cache; they need no plan.
    """

    qkv_format: str = "sbhd"
    positions: torch.Tensor | None = None
    plan: AttentionPlan | None = None
    cache: KVCache | None = None
    _rotary: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    def rotary(self, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [s, 1 or b, head_dim / 2] float32: computed by the first layer, shared by the others.

        All layers of a model have the same frequencies.
        """
        if self._rotary is None:
            assert self.positions is not None
            self._rotary = cos_sin(inverse_frequencies, self.positions.t())
        return self._rotary

    @classmethod
    def of(cls, batch: MicroBatch) -> AttentionInputs:
        """The inputs for a micro-batch."""
        return cls(positions=batch.positions, plan=batch.plan)
