"""What a rank of the worker pool runs in the model tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalong.config.rope import RopeSettings
from megalong.runtime import distributed


def logits(
    hf: str,
    positions: list[int],
    tokens: list[list[int]],
    parallel: dict[str, int],
    rope: dict[str, Any] | None = None,
) -> np.ndarray:
    """Full-vocabulary logits [b, s, V] of our model with the weights of `hf`, float64 for the comparison's sake.

    Context-parallel ranks return their shard's rows in shard order; the caller puts them back.
    `rope` overrides the folder's positions, as `model.rope` does.
    """
    device = torch.device("cpu")
    distributed.start(device)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megalong.attention.layout import ZigzagLayout
    from megalong.hf.config import read_architecture
    from megalong.hf.load import load_into
    from megalong.hf.reader import HFReader
    from megalong.model.batch import AttentionInputs
    from megalong.model.build import build_model
    from megalong.model.config import ModelSettings

    layout = distributed.Layout(**parallel)
    distributed.set_layout(layout)
    try:
        override = RopeSettings(**rope) if rope else None
        architecture = read_architecture(Path(hf)).with_rope(override)
        (model,) = build_model(architecture, ModelSettings(layout=layout, params_dtype=torch.float32))
        load_into(
            model, HFReader(Path(hf)), architecture, parallel_state.get_tensor_model_parallel_rank(), layout.tensor
        )
        rows = ZigzagLayout(layout.context).indices(len(positions), parallel_state.get_context_parallel_rank())
        inputs = AttentionInputs(positions=torch.tensor(positions)[rows])
        with torch.no_grad():
            out: Any = model(torch.tensor(tokens)[:, rows], None, None, packed_seq_params=inputs)
            whole = gather_from_tensor_model_parallel_region(out)
        return whole[..., : architecture.vocab_size].double().numpy()
    finally:
        distributed.clear_layout()
