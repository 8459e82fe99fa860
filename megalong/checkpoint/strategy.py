"""Writing shards in this process.

Megatron-Core's own strategy hands shards to child processes through a queue server, even for a blocking save. That
costs a second or more per save and cannot run inside a daemon process. Each rank here writes its one file with
torch's file writer, synced to disk; the format on disk is the same, and Megatron-Core's loader reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed import checkpoint as torch_checkpoint

from megalong.runtime.megatron import checkpoint_strategy_arguments


class DirectSave(torch_dist.TorchDistSaveShardedStrategy):
    """Megatron-Core's `torch_dist` format, written by the calling process."""

    def __init__(self) -> None:
        super().__init__(*checkpoint_strategy_arguments(torch_dist.TorchDistSaveShardedStrategy))

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas; collective over the world."""
        grouped, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(grouped, False),
            storage_writer=torch_checkpoint.FileSystemWriter(
                checkpoint_dir, single_file_per_rank=True, sync_files=True
            ),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
