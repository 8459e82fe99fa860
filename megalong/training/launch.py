"""`megalong train`: check everything that can be checked, then start processes or join them.

    megalong train CONFIG.yaml                     one process
    megalong train CONFIG.yaml --nproc 4           four local processes, started here
    torchrun … -m megalong train CONFIG.yaml       joins the processes torchrun started

Everything that the configuration, the datasets and the checkpoint show is checked before a process is started.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from megalong.batches import dali
from megalong.batches.open_samples import Samples, check_tokenizer, open_samples
from megalong.config.architecture import Architecture
from megalong.config.checks import check_model, check_world
from megalong.config.load import load_config
from megalong.config.positions import check_positions
from megalong.config.resolved import exchange_of
from megalong.config.schema import Config
from megalong.config.text import dump_config
from megalong.data.samples.sampler import PackedSamples
from megalong.errors import UserError
from megalong.runtime import gpus
from megalong.runtime.folders import refuse_unwritable
from megalong.runtime.launch import run_local
from megalong.runtime.requeue import clear
from megalong.runtime.run_lock import held, refuse_held
from megalong.training.start import as_configured, find_start


def train(config_path: str, overrides: list[str] | None = None, nproc: int | None = None) -> int:
    """Run every stage of a configuration to its end; returns the exit status.

    Args:
        overrides: `section.key=value`.
        nproc: local processes to start; None joins those of torchrun, or runs in this process.

    Raises:
        UserError: the configuration, the data, the checkpoint or the number of processes is wrong.
    """
    overrides = overrides or []
    stages = load_config(config_path, overrides)
    under_launcher = "RANK" in os.environ
    if nproc is not None and under_launcher:
        raise UserError("--nproc: torchrun has already started these processes; drop --nproc")
    world = int(os.environ["WORLD_SIZE"]) if under_launcher else nproc or 1
    if stages[0].runtime.device != "cpu":
        gpus.refuse_more_processes(nproc)
    runs = [Path(config.run.dir) for config in stages]
    if os.environ.get("RANK", "0") == "0":
        for run in runs:
            refuse_held(run)
            clear(run)
    _check(stages, world)
    if nproc is not None and nproc > 1:
        return run_local(["train", config_path, *overrides], nproc)
    with held(runs if os.environ.get("RANK", "0") == "0" else []):
        _run_here(stages)
    return 0


def _check(stages: list[Config], world: int) -> None:
    """Check all stages before any process starts: a mistake in the last must not show after days of the first.

    A stage that starts from the previous one has its architecture, with positions and window of its own. The previous
    stage's checkpoint need not exist yet.
    """
    architecture: Architecture | None = None
    assets: Path | None = None
    for index, config in enumerate(stages):
        check_world(config, world)
        follows = index > 0 and _follows(config, stages[index - 1])
        if architecture is not None and follows:
            check_positions(config, architecture)
            architecture = as_configured(config, architecture)
        else:
            start = find_start(config)
            architecture, assets = start.architecture, start.assets
        check_model(config, architecture)
        exchange_of(config, architecture)
        if config.data.loader == "dali":
            dali.check_installed()
        for part in ("train", "validation") if config.evaluation.interval else ("train",):
            samples = _open(config, part, follows)
            if part == "train" and isinstance(samples, PackedSamples):
                samples.refuse_repeats(config.training.train_iters * config.training.global_batch_size)
        if samples is not None:
            _check_vocabulary(samples, architecture.vocab_size)
            check_tokenizer(config, samples, assets)
        refuse_unwritable(Path(config.run.dir), "run.dir")


def _follows(config: Config, before: Config) -> bool:
    load = config.model.load
    return load is not None and load.checkpoint == before.run.dir


def _open(config: Config, part: str, follows: bool) -> Samples | None:
    """The samples of a part. Rank 0 tokenizes conversations here.

    None for conversations on other ranks, or if the previous stage has yet to provide the tokenizer.
    """
    if config.task == "pretrain":
        return open_samples(config, part, None, None)
    if os.environ.get("RANK", "0") != "0" or (follows and config.sft.tokenizer is None):
        return None
    return open_samples(config, part, find_start(config).assets, Path(config.run.dir) / "index")


def _check_vocabulary(samples: Samples, vocabulary: int) -> None:
    if isinstance(samples, PackedSamples):
        if os.environ.get("RANK", "0") == "0":  # it reads up to 256 MB of each dataset
            samples.refuse_foreign_ids(vocabulary)
    elif samples.vocabulary_size > vocabulary:
        raise UserError(
            f"sft.sources: tokenized with a vocabulary of {samples.vocabulary_size}, but the model has {vocabulary}; "
            "use the model's own tokenizer"
        )


def _run_here(stages: list[Config]) -> None:
    from megalong.runtime import signals

    signals.end_at_interrupt("interrupted before the first step: nothing to save; run the same command to start again")
    signals.listen(signal.SIGUSR1)
    try:
        _join_and_run(stages)
    finally:
        signals.restore_handlers()


def _join_and_run(stages: list[Config]) -> None:
    from megalong.runtime import peers
    from megalong.runtime.distributed import choose_device
    from megalong.runtime.flight_recorder import record_collectives
    from megalong.runtime.world import console_logging, world

    with console_logging():
        runtime = stages[0].runtime
        device = choose_device(runtime.device)
        if device.type == "cuda":
            record_collectives(Path(stages[0].run.dir), runtime.flight_recorder_events)
        with world(device, timeout_minutes=runtime.timeout_minutes):
            try:
                for config in stages:
                    if _run_stage(config, device) == "interrupted":
                        break
            except BaseException as error:  # torch's CheckpointException is no Exception
                peers.end_if_lost(error)
                raise


def _run_stage(config: Config, device: object) -> str:
    import torch
    import torch.distributed as dist

    from megalong.runtime import peers
    from megalong.runtime.distributed import is_main_rank
    from megalong.runtime.logs import setup_logging
    from megalong.training.lives import run_until_finished

    run = Path(config.run.dir)
    log = setup_logging(dist.get_rank(), run)
    if is_main_rank():
        dump_config(config, run / "config.yaml")
    assert isinstance(device, torch.device)
    log.info("run %s on %d × %s", config.run.name, dist.get_world_size(), device.type)
    if (line := peers.network_line()) is not None:
        log.info(line)
    return run_until_finished(config, device)
