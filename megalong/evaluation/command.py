"""`megalong evaluate perplexity`: the perplexity of several models on one text, by position.

    megalong evaluate perplexity --hf BASE --checkpoint RUN --data PREFIX --seq-length 4096 --samples 16 --output DIR

writes DIR/perplexity.json (which `load_results` reads), perplexity.md and perplexity.png, with a row and a line for
each model. Existing files are kept unless `--overwrite` is given. The whole dataset is used, in a shuffled order that
depends only on the dataset, so all models are measured on the same sequences: give documents that no model was trained
on, or `--held-out` for those that a run held out. `--nproc N` splits the sequence over N processes by context
parallelism, for lengths that do not fit into one process.

The length may exceed the one that a model was trained on, to show that the model breaks there. `--rope` measures a
model with another RoPE scaling than its own, without training.
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
    ModelOption,
    ModelSource,
    Text,
    distinct_names,
    find_models,
    given_text,
    held_out_text,
    open_text,
    tokenizer_notes,
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
    models: Sequence[ModelOption],
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
    """Measure models, print their table, and write table, numbers and plot to `output` (if given).

    Args:
        models: `("checkpoint", RUN_OR_STEP)`, `("hf", DIR)` and `("rope", YAML)`, see `find_models`.
        data: prefix of an indexed dataset, tokenized with the models' tokenizer.
        held_out: instead of `data`, a domain of the first run among the models, or `all`.
        seq_length: tokens per sample.
        samples: sequences to average over.
        nproc: context-parallel processes to start; None: use torchrun's, or this process.
        dtype: type to compute in, see `find_model`.
        overwrite: replace the files of an earlier measurement in `output`.
        allow_other_tokenizer: measure even if the dataset was made with another tokenizer than a model's.

    Raises:
        UserError: no such model or dataset, a length that the processes cannot split or that does not fit, too few
            tokens, an earlier measurement in `output`.
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
        # The processes have printed the error; only their status is passed on.
        raise SystemExit(status)


def _measure(
    opened: Sequence[tuple[ModelSource, PackedSamples]], text: Text, samples: int, notes: Sequence[str]
) -> list[PerplexityResult]:
    """Join the world, log `notes`, measure one model after another, leave the world."""
    import torch.distributed as dist

    from megalong.evaluation.perplexity import PerplexityResult
    from megalong.runtime.distributed import choose_device
    from megalong.runtime.world import console_logging, world

    device, results = choose_device(), []
    with world(device), console_logging():
        # These import Megatron-Core, for which the process must be prepared first.
        from megalong.evaluation.measure import measure_losses
        from megalong.runtime.distributed import set_grid

        for source, packed in opened:
            _refuse_what_cannot_fit(source, packed.seq_length, device)
        for note in notes if dist.get_rank() == 0 else ():
            log.warning("%s", note)
        set_grid(Grid(context=dist.get_world_size()))
        for (source, packed), name in zip(opened, distinct_names([source for source, _ in opened]), strict=True):
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
    """Decide by the rank with the least memory, so that all ranks refuse together, before any rank reads weights."""
    from megalong.runtime.distributed import from_all_ranks

    # A process that was started without a launcher is alone here.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = from_all_ranks([float(free_bytes(device, local_world))])
    least = min(one for (one,) in free)
    refuse_what_cannot_fit(source.architecture, seq_length, len(free), least, device.type == "cuda")


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
    save_results(results, folder / "perplexity.json")  # last: if it exists, the others do too
    print(f"written: {folder}/{', '.join(FILES)}")
