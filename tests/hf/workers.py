"""What the pool's workers do for the conversion tests: Megatron-Core stays out of the test process."""

from pathlib import Path

import torch

from megalong.checkpoint.folder import Meta, step_folder
from megalong.hf.config import read_architecture
from megalong.hf.convert import export_hf, import_hf
from megalong.hf.load import load_into
from megalong.hf.reader import HFReader
from megalong.runtime.distributed import clear_grid, set_grid, start
from megalong.runtime.grid import Grid


def convert(jobs: list[tuple[str | None, str, str]], dtype: str | None = None) -> None:
    """For each (hf, checkpoint, output): import, unless `hf` is None, and export in shards of 40 kB."""
    for hf, checkpoint, output in jobs:
        if hf is not None:
            import_hf(hf=hf, output=checkpoint)
        export_hf(checkpoint=checkpoint, output=output, dtype=dtype, max_shard_bytes=40_000)


def save_under_layouts(jobs: list[tuple[str, str, int, int]]) -> None:
    """For each (hf, run, TP, PP): every rank reads its own slices, and all save as step 7 of the run."""
    start(torch.device("cpu"))
    for hf, run, tensor, pipeline in jobs:
        _save(Path(hf), Path(run), Grid(tensor=tensor, pipeline=pipeline))
    clear_grid()


def _save(hf: Path, run: Path, layout: Grid) -> None:
    from megatron.core import parallel_state

    from megalong.checkpoint.store import save_weights
    from megalong.model.build import build_model, unwrap
    from megalong.model.config import ModelSettings

    set_grid(layout)
    architecture = read_architecture(hf)
    chunks = build_model(architecture, ModelSettings(grid=layout, params_dtype=torch.float32))
    with HFReader(hf) as reader:
        rank = parallel_state.get_tensor_model_parallel_rank()
        load_into(chunks[0], reader, architecture, rank, layout.tensor, unwrap(chunks[0]).first_layer)
    save_weights(step_folder(run, 7), chunks, Meta(step=7, architecture=architecture), hf)
