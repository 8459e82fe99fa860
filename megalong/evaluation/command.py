"""`megalong evaluate perplexity`: models on one text, perplexity by position.

    megalong evaluate perplexity --hf BASE --checkpoint RUN --data PREFIX --seq-length 4096 --samples 16 --output DIR

writes DIR/perplexity.json (read again by `load_results`), perplexity.md and perplexity.png, with a row and a line for
each model, and never over others. A dataset is taken whole, in one shuffled order that depends on nothing but the
dataset, so all models are measured on the same sequences: give documents that none was trained on, or `--held-out` for
those that a run set aside. With `--nproc N` the sequence is split over N processes by context parallelism, which is
what makes lengths fit that one process cannot hold.

The length measured may exceed the one a model was trained for: seeing that it breaks there is the point. `--rope`
measures a model under other positions than its own, without training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalong.data.samples.sampler import PackedSamples
from megalong.errors import UserError
from megalong.evaluation.fit import free_bytes, refuse_what_cannot_fit
from megalong.evaluation.source import (
    Asked,
    ModelSource,
    Text,
    find_models,
    given_text,
    held_out_text,
    open_text,
    tokenizer_notes,
    told_apart,
)
from megalong.runtime import gpus
from megalong.runtime.folders import refuse_overwriting, refuse_unwritable
from megalong.runtime.grid import Grid
from megalong.runtime.launch import run_local

log = logging.getLogger("megalong")

if TYPE_CHECKING:
    import torch

    from megalong.evaluation.perplexity import PerplexityResult

FILES = ("perplexity.json", "perplexity.md", "perplexity.png")


def perplexity(
    *,
    models: Sequence[Asked],
    data: str | None = None,
    held_out: str | None = None,
    seq_length: int,
    samples: int = 8,
    nproc: int | None = None,
    dtype: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
    allow_other_tokenizer: bool = False,
) -> None:
    """Measure models, print their table, and write table, numbers and picture to `output` (if given).

    Args:
        models: `("checkpoint", RUN_OR_STEP)`, `("hf", DIR)` and `("rope", YAML)`, as `find_models` has them.
        data: prefix of an indexed dataset, tokenized with the models' tokenizer; or else `held_out`, a domain of the
            first run among the models, or `all`.
        seq_length: tokens per sample.
        samples: sequences to average over.
        nproc: context-parallel processes to start here; None joins torchrun's, or runs in this one.
        dtype: type to compute in, as `find_model` has it.
        overwrite: replace what an earlier measurement left in `output`.
        allow_other_tokenizer: measure although the dataset was made with another tokenizer than a model's.

    Raises:
        UserError: no such model or dataset, a length the processes cannot share or hold, fewer tokens than asked for,
            an earlier measurement in `output`.
    """
    launched = "RANK" in os.environ
    if nproc is not None and launched:
        raise UserError("--nproc: these processes were started by torchrun already; drop --nproc")
    gpus.refuse_more_processes(nproc)
    sources = find_models(models, dtype)
    text = _text(data, held_out, sources)
    notes, opened = list(text.notes), []
    for source in sources:
        packed = open_text(text, seq_length, samples, source, allow_other_tokenizer)
        notes += tokenizer_notes(packed, source, allow_other_tokenizer)
        opened.append((source, packed))
    if output is not None:
        refuse_unwritable(Path(output), "--output")
        refuse_overwriting([Path(output) / name for name in FILES], "--output", overwrite)
    if nproc is not None and nproc > 1:
        command = [word for option, value in models for word in (f"--{option}", value)]
        command += ["--data", data] if data is not None else ["--held-out", str(held_out)]
        command += ["--seq-length", str(seq_length), "--samples", str(samples)]
        command += ["--dtype", dtype] if dtype is not None else []
        command += ["--output", output] if output is not None else []
        command += ["--overwrite"] if overwrite else []
        command += ["--allow-other-tokenizer"] if allow_other_tokenizer else []
        _spawn(["evaluate", "perplexity", *command], nproc)
        return
    results = _measure(opened, text, samples, list(dict.fromkeys(notes)))
    if int(os.environ.get("RANK", 0)) == 0:
        _publish(results, output)


def _text(data: str | None, held_out: str | None, sources: Sequence[ModelSource]) -> Text:
    if (data is None) == (held_out is None):
        raise UserError("give exactly one text: --data PREFIX, or --held-out DOMAIN of a run")
    return given_text(data, sources) if data is not None else held_out_text(str(held_out), sources)


def _spawn(command: list[str], nproc: int) -> None:
    status = run_local(command, nproc)
    if status:
        # The processes have told what went wrong; only their status is left to pass on.
        raise SystemExit(status)


def _measure(
    opened: Sequence[tuple[ModelSource, PackedSamples]], text: Text, samples: int, notes: Sequence[str]
) -> list[PerplexityResult]:
    """Join the world, log `notes`, measure one model after the other, leave it."""
    import torch.distributed as dist

    from megalong.evaluation.perplexity import PerplexityResult
    from megalong.runtime.distributed import choose_device
    from megalong.runtime.world import logged, world

    device, results = choose_device(), []
    with world(device), logged():
        # Imports the model, and with it Megatron-Core: only now is the process prepared for that.
        from megalong.evaluation.measure import measure_losses
        from megalong.runtime.distributed import set_grid

        for source, packed in opened:
            _refuse_what_cannot_fit(source, packed.seq_length, device)
        for note in notes if dist.get_rank() == 0 else ():
            log.warning("%s", note)
        set_grid(Grid(context=dist.get_world_size()))
        for (source, packed), name in zip(opened, told_apart([source for source, _ in opened]), strict=True):
            positions = measure_losses(source, packed, samples, device)
            results.append(
                PerplexityResult(
                    name=name,
                    source=str(source),
                    data=[dataset.path for dataset in text.datasets],
                    seq_length=packed.seq_length,
                    samples=samples,
                    edges=positions.edges,
                    nll=positions.means(),
                    tokens=positions.sums_counts()[1],
                    text=text.name,
                )
            )
    return results


def _refuse_what_cannot_fit(source: ModelSource, seq_length: int, device: torch.device) -> None:
    """By the rank that has least memory, so that all ranks refuse together; before any of them reads weights."""
    from megalong.runtime.distributed import from_all_ranks

    # A process that was started by hand is alone here.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = from_all_ranks([float(free_bytes(device, local_world))])
    there = min(one for (one,) in free)
    refuse_what_cannot_fit(source.architecture, seq_length, len(free), there, device.type == "cuda")


def _publish(results: list[PerplexityResult], output: str | None) -> None:
    from megalong.evaluation.perplexity import perplexity_table, save_results

    table = perplexity_table(results)
    print(table)
    if output is None:
        return
    from megalong.evaluation.plots import plot_perplexity

    folder = Path(output)
    title = "Perplexity by position" + (f": {results[0].name}" if len(results) == 1 else "")
    plot_perplexity(results, folder / "perplexity.png", title=title)
    (folder / "perplexity.md").write_text(table + "\n")
    save_results(results, folder / "perplexity.json")  # last: where it stands, the others do too
    print(f"written: {folder}/{', '.join(FILES)}")
