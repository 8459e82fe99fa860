"""Build everything a run needs before its first step, in this order.

    device and groups → architecture → model → weights → optimizer and schedule → data

If the run folder contains a checkpoint, the run resumes from it: model, optimizer, schedule, random states and the
position in the data are restored, and `model.load` is not read. Otherwise the run starts from weights alone: those of a
Hugging Face folder or of another run's checkpoint, or random ones; step, schedule, optimizer and data position start at
zero.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.attention.transformer_engine import machine_of
from megalong.checkpoint import folder, store
from megalong.checkpoint.saver import Saved, Saver, set_aside
from megalong.checkpoint.verification import Verification
from megalong.config.architecture import Architecture
from megalong.config.attention_checks import Machine, check_fp8_model, check_machine
from megalong.config.checks import check_model, check_world
from megalong.config.lora import Lora
from megalong.config.resolved import Resolved, dump, resolve
from megalong.config.schema import Config
from megalong.data.fingerprint import Fingerprint, fingerprint
from megalong.hf.adapter import AdapterReader
from megalong.hf.load import fill
from megalong.hf.random_weights import RandomWeights
from megalong.hf.reader import HFReader
from megalong.model.build import build_model, unwrap, wrap_for_training
from megalong.model.config import DTYPES, ModelSettings
from megalong.model.implementations import Implementations, implementations
from megalong.model.lora import adapters, random_adapters
from megalong.runtime import distributed
from megalong.training.activation_memory import refuse_without_memory
from megalong.training.first_lines import model_line
from megalong.training.guard import Guard
from megalong.training.optimizer import build_optimizer, build_scheduler, changed, recorded
from megalong.training.start import Start, find_start

log = logging.getLogger("megalong")


@dataclass
class Session:
    """A run that is ready to step.

    `data` is the fingerprint of the data order at the start. `guard` checks the steps. `base` names the folder of the
    base weights that adapters are trained on.
    """

    config: Config
    device: torch.device
    architecture: Architecture
    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    step: int
    consumed_samples: int
    assets: Path | None
    guard: Guard
    saver: Saver
    resolved: Resolved
    data: Fingerprint = field(default_factory=dict)
    base: str | None = None


def model_settings(config: Config, resolved: Resolved) -> ModelSettings:
    """The configured grid, precision, attention, FP8 and LoRA settings of the model."""
    return ModelSettings(
        grid=resolved.grid,
        sequence_parallel=config.parallel.sequence_parallel,
        params_dtype=DTYPES[config.precision.params_dtype],
        recompute=config.memory.recompute,
        attention=resolved.backend,
        transport=resolved.exchange.transport,
        fp8=config.precision.fp8,
        fp8_recipe=config.precision.fp8_recipe,
        fp8_dot_product_attention=config.precision.fp8_dot_product_attention,
        lora=lora_of(config),
    )


def lora_of(config: Config) -> Lora | None:
    """The run's LoRA settings; None if it trains all weights."""
    return None if config.lora.rank is None else config.lora.shape


def set_up(config: Config, device: torch.device) -> Session:
    """Build model, optimizer and schedule in a world that `runtime.distributed.start` has joined.

    Damaged checkpoints are logged and renamed, and the run resumes from the newest good one. Its files are verified
    while the model is built and loaded. If that finds damage, all ranks start the set-up again.

    Raises:
        UserError: the world, the machine, the model or the checkpoint does not fit the configuration.
        DamagedError: there are checkpoints, and none is good.
    """
    machine = machine_of(device)
    check_machine(config, machine)
    check_world(config, dist.get_world_size())
    while True:
        start = _with_kept_assets(config, _undamaged_start(config))
        try:
            return _session(config, device, machine, start)
        except folder.DamagedError as error:
            if start.resume is None:
                raise
            damaged = start.resume, str(error)
        # The partly loaded session has been freed by now.
        if folder.whole_checkpoints(Path(config.run.dir))[0] == damaged[0]:
            raise folder.DamagedError(
                f"{damaged[1]}; no checkpoint of this run is good: copy one again, or give another run.dir"
            )
        _set_aside([damaged])


def _undamaged_start(config: Config) -> Start:
    """Find where the run starts, after renaming incomplete checkpoints."""
    while True:
        start = find_start(config)
        if not start.damaged:
            return start
        _set_aside(start.damaged)


def _with_kept_assets(config: Config, start: Start) -> Start:
    """`start` with the run's own copy of the tokenizer, which stays when the original folder is deleted."""
    if start.assets is None:
        return start
    run = Path(config.run.dir)
    if distributed.is_main_rank():
        folder.keep_assets(run, start.assets)
    dist.barrier()
    return replace(start, assets=run / folder.ASSETS)


def _set_aside(damaged: Sequence[tuple[Path, str]]) -> None:
    dist.barrier()  # no rank may look for checkpoints while they are renamed
    if distributed.is_main_rank():
        for path, why in damaged:
            log.warning(
                "%s; it is renamed to %s.damaged, and the run resumes from an earlier checkpoint", why, path.name
            )
            set_aside(path)
    dist.barrier()


def _session(config: Config, device: torch.device, machine: Machine, start: Start) -> Session:
    verification = Verification(start.resume) if start.resume is not None else None
    check_model(config, start.architecture)
    check_fp8_model(config, machine, start.architecture)
    log.info(model_line(config, start.architecture))
    refuse_without_memory(config, start.architecture, device)
    resolved = resolve(config, start.architecture, machine, dist.get_world_size())
    if distributed.is_main_rank():
        dump(resolved, Path(config.run.dir))
    if resolved.grid.context > 1:
        log.info("context-parallel attention: %s (%s)", resolved.exchange.name, resolved.exchange.reason)
    distributed.set_grid(resolved.grid, config.run.seed, config.runtime.timeout_minutes)
    bare = build_model(start.architecture, model_settings(config, resolved))
    log.info("computes with %s", _implementations(config, resolved, device, machine, start.architecture))
    if start.resume is None:
        _load_initial_weights(start, config, bare)
    chunks = wrap_for_training(bare, config.parallel)
    optimizer = build_optimizer(config, chunks)
    session = Session(
        config,
        device,
        start.architecture,
        chunks,
        optimizer,
        build_scheduler(config, optimizer),
        step=0,
        consumed_samples=0,
        assets=start.assets,
        guard=Guard(config.guard),
        resolved=resolved,
        saver=Saver(Path(config.run.dir), config.checkpoint, config.runtime.timeout_minutes),
        data=fingerprint(config),
        base=start.base,
    )
    if verification is not None:
        _resume(session, start, verification)
    return session


def _implementations(
    config: Config, resolved: Resolved, device: torch.device, machine: Machine, architecture: Architecture
) -> Implementations:
    precision = config.precision
    return implementations(
        device,
        machine,
        precision.params_dtype,
        architecture.kv_channels,
        resolved.backend,
        precision.fp8,
        precision.fp8_dot_product_attention,
    )


def _resume(session: Session, start: Start, verification: Verification) -> None:
    """Restore the session from the checkpoint."""
    assert start.resume is not None
    started = time.perf_counter()
    meta = folder.read_meta(start.resume)
    store.load_training(start.resume, session.chunks, session.optimizer, session.scheduler, meta, verification)
    session.step, session.consumed_samples = meta.step, meta.consumed_samples
    session.guard = Guard(session.config.guard, meta.guard)
    log.info(
        "resumed from %s in %.1f s: model, optimizer, schedule and data position of step %d",
        start.resume,
        time.perf_counter() - started,
        meta.step,
    )
    _log_changes(session, meta)
    if start.changed_data:
        log.warning(
            "data.allow_change: the data has changed from sample %d on: %s",
            session.consumed_samples,
            "; ".join(start.changed_data),
        )


def _log_changes(session: Session, meta: folder.Meta) -> None:
    """Log the optimizer and schedule settings that differ from the checkpoint's."""
    if not meta.settings:
        log.info(
            "step %d does not record its optimizer settings (an earlier version wrote it); using the config's",
            meta.step,
        )
    elif found := changed(meta.settings, recorded(session.config)):
        log.warning(
            "changed since step %d: %s; the config's values apply from step %d on",
            meta.step,
            "; ".join(found),
            meta.step + 1,
        )


def _load_initial_weights(start: Start, config: Config, chunks: list[torch.nn.Module]) -> None:
    """Weights only: everything else about the run is fresh."""
    _load_initial_adapters(start, config, chunks)
    if start.checkpoint is not None:
        store.load_weights(start.checkpoint, chunks)
        log.info("weights from %s; step, optimizer, schedule and data position start fresh", start.checkpoint)
        return
    if start.hf is None:
        fill(chunks, RandomWeights(start.architecture, config.run.seed), start.architecture)
        log.info("random weights from seed %d; everything else starts fresh", config.run.seed)
        return
    with HFReader(start.hf) as reader:
        reader.check(start.architecture)
        fill(chunks, reader, start.architecture)
    log.info("weights from %s; step, optimizer, schedule and data position start fresh", start.hf)


def _load_initial_adapters(start: Start, config: Config, chunks: list[torch.nn.Module]) -> None:
    """Load the adapters of `lora.load`, or initialize new ones. A checkpoint with adapters overwrites them later."""
    lora = config.lora
    if lora.rank is None:
        return
    source = AdapterReader(Path(lora.load)) if lora.load is not None else random_adapters(config.run.seed)
    for chunk in map(unwrap, chunks):
        for adapter in adapters(chunk):
            adapter.fill(source)
    log.info("adapters: %s; %s", lora, f"from {lora.load}" if lora.load else "fresh")


def save(session: Session) -> Saved | None:
    """Start saving the session's step. Returns the result of the previous save if it was still running."""
    config = session.config
    meta = folder.Meta(
        step=session.step,
        consumed_samples=session.consumed_samples,
        architecture=session.architecture,
        layout=store.current_layout(),
        lora=lora_of(config),
        base=session.base if lora_of(config) is not None else None,
        optimizer=config.checkpoint.optimizer,
        versions=store.versions(),
        data=session.data,
        guard=session.guard.state(),
        settings=recorded(config),
    )
    if config.parallel.overlap_param_gather:  # updated weights may not have been gathered yet
        for chunk in session.chunks:
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
    return session.saver.save(session.chunks, session.optimizer, session.scheduler, meta, session.assets)
