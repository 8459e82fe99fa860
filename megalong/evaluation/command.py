"""`megalong evaluate perplexity`: one model, one dataset, perplexity by position.

    megalong evaluate perplexity --checkpoint RUN --data PREFIX --seq-length 4096 --samples 16 --output DIR

writes DIR/perplexity.json (read again by `PerplexityResult.load`), perplexity.md and perplexity.png. The dataset is
taken whole, in one shuffled order that depends on nothing but the dataset, so two models are measured on the same
sequences: give documents that neither was trained on. With `--nproc N` the sequence is split over N processes by
context parallelism, which is what makes lengths fit that one process cannot hold.

The length measured may exceed the one the model was trained for: seeing that it breaks there is the point.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from megalong.data.sampler import PackedSamples
from megalong.errors import UserError
from megalong.evaluation.fit import free_bytes, refuse_what_cannot_fit
from megalong.evaluation.source import ModelSource, find_model, open_held_out, tokenizer_notes
from megalong.runtime import gpus
from megalong.runtime.folders import refuse_unwritable
from megalong.runtime.launch import run_local

if TYPE_CHECKING:
    import torch

    from megalong.evaluation.perplexity import PerplexityResult


def perplexity(
    *,
    checkpoint: str | None = None,
    hf: str | None = None,
    data: str,
    seq_length: int,
    samples: int = 8,
    nproc: int | None = None,
    dtype: str | None = None,
    output: str | None = None,
    allow_other_tokenizer: bool = False,
) -> None:
    """Measure one model, print its table, and write table, numbers and picture to `output` (if given).

    Args:
        checkpoint: a run's folder (its newest step) or one step's; or else `hf`, a Hugging Face folder.
        data: prefix of an indexed dataset, tokenized with the model's tokenizer.
        seq_length: tokens per sample.
        samples: sequences to average over.
        nproc: context-parallel processes to start here; None joins torchrun's, or runs in this one.
        dtype: type to compute in, as `find_model` has it.
        allow_other_tokenizer: measure although the dataset was made with another tokenizer than the model's.

    Raises:
        UserError: no such model or dataset, a length the processes cannot share or hold, fewer tokens than asked for.
    """
    launched = "RANK" in os.environ
    if nproc is not None and launched:
        raise UserError("--nproc: these processes were started by torchrun already; drop --nproc")
    gpus.refuse_more_processes(nproc)
    source = find_model(checkpoint, hf, dtype)
    packed = open_held_out(data, seq_length, samples, source, allow_other_tokenizer)
    if output is not None:
        refuse_unwritable(Path(output), "--output")
    if nproc is not None and nproc > 1:
        model = ["--hf", hf] if hf is not None else ["--checkpoint", str(checkpoint)]
        where = ["--output", output] if output is not None else []
        sizes = ["--seq-length", str(seq_length), "--samples", str(samples)]
        sizes += ["--dtype", dtype] if dtype is not None else []
        where += ["--allow-other-tokenizer"] if allow_other_tokenizer else []
        _spawn(["evaluate", "perplexity", *model, "--data", data, *sizes, *where], nproc)
        return
    result = _measure(source, data, packed, samples, tokenizer_notes(packed, source, allow_other_tokenizer))
    if int(os.environ.get("RANK", 0)) == 0:
        _publish(result, output)


def _spawn(command: list[str], nproc: int) -> None:
    status = run_local(command, nproc)
    if status:
        # The processes have told what went wrong; only their status is left to pass on.
        raise SystemExit(status)


def _measure(source: ModelSource, data: str, packed: PackedSamples, samples: int, notes: list[str]) -> PerplexityResult:
    """Join the world, log `notes`, measure, leave it."""
    import torch.distributed as dist

    from megalong.evaluation.perplexity import PerplexityResult
    from megalong.runtime import distributed
    from megalong.runtime.logs import close_logging, setup_logging

    device = distributed.choose_device()
    distributed.start(device)
    try:
        # Imports the model, and with it Megatron-Core: only now is the process prepared for that.
        from megalong.evaluation.measure import measure_losses

        log = setup_logging(dist.get_rank())
        _refuse_what_cannot_fit(source, packed.seq_length, device)
        for note in notes if dist.get_rank() == 0 else []:
            log.warning("%s", note)
        distributed.set_layout(distributed.Layout(context=dist.get_world_size()))
        positions = measure_losses(source, packed, samples, device)
    finally:
        distributed.stop()
        close_logging()
    return PerplexityResult(
        name=source.name,
        source=str(source),
        data=[data],
        seq_length=packed.seq_length,
        samples=samples,
        edges=positions.edges,
        nll=positions.means(),
        tokens=positions.sums_counts()[1],
    )


def _refuse_what_cannot_fit(source: ModelSource, seq_length: int, device: torch.device) -> None:
    """By the rank that has least memory, so that all ranks refuse together; before any of them reads weights."""
    from megalong.runtime.distributed import from_all_ranks

    # A process that was started by hand is alone here.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = from_all_ranks([float(free_bytes(device, local_world))])
    there = min(one for (one,) in free)
    refuse_what_cannot_fit(source.architecture, seq_length, len(free), there, device.type == "cuda")


def _publish(result: PerplexityResult, output: str | None) -> None:
    from megalong.evaluation.perplexity import perplexity_table

    table = perplexity_table([result])
    print(table)
    if output is None:
        return
    from megalong.evaluation.plots import plot_perplexity

    folder = Path(output)
    plot_perplexity([result], folder / "perplexity.png", title=f"Perplexity by position: {result.name}")
    (folder / "perplexity.md").write_text(table + "\n")
    result.save(folder / "perplexity.json")  # last: where it stands, the others do too
    print(f"written: {folder}/perplexity.json, perplexity.md, perplexity.png")
