"""The grid of ranks: the size of each dimension of parallelism, and each rank's place. Arithmetic, no torch.

Tensor-parallel ranks are neighbours, then context, data and pipeline ranks (`ORDER`, in Megatron-Core's spelling), so
that ranks that communicate most are closest together:

    rank = tensor + TP · (context + CP · (data + DP · stage))

With TP 2, CP 2, DP 1, PP 2 rank 5 = 1 + 2 · 0 + 4 · 1 is tensor rank 1, context rank 0, pipeline stage 1.
"""

from __future__ import annotations

from dataclasses import dataclass

ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True)
class Place:
    """A rank's index in each dimension."""

    tensor: int = 0
    context: int = 0
    data: int = 0
    stage: int = 0


@dataclass(frozen=True)
class Grid:
    """The number of ranks in each dimension of parallelism.

    `virtual` is the number of model chunks per pipeline rank; above 1 the pipeline is interleaved. `heads` neighbouring
    context-parallel ranks share attention by heads instead of by keys; 1 for none.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int = 1
    heads: int = 1

    @property
    def model_parallel_size(self) -> int:
        """TP · CP · PP: ranks that hold one replica of the model and one copy of each sample."""
        return self.tensor * self.context * self.pipeline

    def replicas(self, world: int) -> int:
        """Data-parallel size on `world` processes, a multiple of `model_parallel_size`."""
        return world // self.model_parallel_size

    def place(self, rank: int, world: int) -> Place:
        """The place of `rank` among `world` processes."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        stage, data = divmod(rest, self.replicas(world))
        return Place(tensor, context, data, stage)
