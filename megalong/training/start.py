"""Where a run starts: its own newest checkpoint, or weights from elsewhere.

It builds nothing, so that mistakes are found before a process is started.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from megalong.checkpoint.folder import ASSETS, Meta, find_checkpoint, newest_good, read_meta
from megalong.config.architecture import Architecture
from megalong.config.lora import Lora
from megalong.config.positions import check_positions, refuse_uncovered, trained_architecture
from megalong.config.schema import Config
from megalong.data.fingerprint import changes, fingerprint
from megalong.errors import UserError
from megalong.hf.adapter import check_adapter
from megalong.hf.base import absolute_path
from megalong.hf.config import read_architecture

# What must be equal for a checkpoint to be the same model; rope and windows have messages of their own.
_SHAPE = (
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "tie_word_embeddings",
    "norm_epsilon",
)


# Changes of the data with which a resumed run may use positions that it has not used before.
_DECIDES_POSITIONS = ("data.seq_length", "data.pose", "data.mixture", "sft.max_length")


@dataclass(frozen=True)
class Start:
    """Exactly one of `resume`, `checkpoint`, `hf` is set, or none for random weights.

    Attributes:
        architecture: the model to build, with `model.rope` and `attention`'s window applied.
        assets: folder with the tokenizer files; the run and each of its checkpoints keep a copy.
        base: source of the base weights that adapters are trained on, None if unknown.
        damaged: damaged checkpoints of this run that are newer than `resume`, each with its fault.
        changed_data: how the data differs from what was trained on so far, which `data.allow_change` permits.
    """

    architecture: Architecture
    resume: Path | None = None
    checkpoint: Path | None = None
    hf: Path | None = None
    assets: Path | None = None
    base: str | None = None
    changed_data: tuple[str, ...] = ()
    damaged: tuple[tuple[Path, str], ...] = ()


def find_start(config: Config) -> Start:
    """Decide how `config` starts.

    Raises:
        UserError: a folder is missing or damaged; the run folder's checkpoint has another shape than the configured
            model, or was trained on other data; or samples use positions that no model length covers.
    """
    run = Path(config.run.dir)
    own, damaged = newest_good(run)
    if own is None:
        start = _initial_start(config)
        check_positions(config, start.architecture)
        return _configured(config, start)
    meta = read_meta(own)
    _check_same_model(config, meta.architecture, own)
    _check_same_adapters(config, meta.lora, own)
    _check_same_optimizer(config, meta, own)
    changed = changes(meta.data, fingerprint(config))
    if changed and not config.data.allow_change:
        raise UserError(
            f"run.dir {config.run.dir} was trained on other data up to step {meta.step}: {'; '.join(changed)}; sample "
            f"{meta.consumed_samples} would not be the next one: restore the data, start a new run.dir with "
            f"model.load: {{checkpoint: {config.run.dir}}}, or write data.allow_change: true"
        )
    if any(change.startswith(_DECIDES_POSITIONS) for change in changed):
        refuse_uncovered(config, meta.architecture)
    return Start(
        meta.architecture,
        resume=own,
        assets=_assets(own) or _kept_assets(config),
        base=meta.base or _named_base(config),
        changed_data=tuple(changed),
        damaged=tuple(damaged),
    )


def as_configured(config: Config, architecture: Architecture) -> Architecture:
    """`architecture` with the positions and the window that `config` trains it with; idempotent.

    Raises:
        UserError: the window pattern is for another number of layers.
    """
    attention = config.attention
    trained = trained_architecture(config, architecture)
    return trained.with_window(attention.window_size, attention.window_attn_skip_freq)


def _configured(config: Config, start: Start) -> Start:
    start = replace(start, architecture=as_configured(config, start.architecture))
    check_adapter(config.lora, start.architecture)
    return start


def _initial_start(config: Config) -> Start:
    """The model to start from, before the configuration changes it."""
    load = config.model.load
    if load is None:
        assert config.model.architecture is not None
        return Start(config.model.architecture)
    if load.hf is not None:
        folder = Path(load.hf)
        return Start(read_architecture(folder), hf=folder, assets=folder, base=_named_base(config))
    assert load.checkpoint is not None
    checkpoint = find_checkpoint(load.checkpoint)
    meta = read_meta(checkpoint)
    if meta.lora is not None:
        _check_same_adapters(config, meta.lora, checkpoint)
        if config.lora.load is not None:
            raise UserError(f"lora.load {config.lora.load}: {checkpoint} has adapters of its own; drop one of them")
    trained = None if meta.lora is not None else absolute_path(checkpoint)
    return Start(meta.architecture, checkpoint=checkpoint, assets=_assets(checkpoint), base=meta.base or trained)


def _named_base(config: Config) -> str | None:
    """The Hugging Face folder that the configuration starts from, which earlier versions' checkpoints do not record."""
    load = config.model.load
    return absolute_path(load.hf) if load is not None and load.hf is not None else None


def _assets(checkpoint: Path) -> Path | None:
    folder = checkpoint / ASSETS
    return folder if folder.is_dir() else None


def _kept_assets(config: Config) -> Path | None:
    """The tokenizer of a run whose newest checkpoint has none; earlier versions could lose it."""
    kept = Path(config.run.dir) / ASSETS
    if kept.is_dir():
        return kept
    with contextlib.suppress(UserError):  # what it started from may be gone
        return _initial_start(config).assets
    return None


def _check_same_model(config: Config, found: Architecture, checkpoint: Path) -> None:
    """Refuse to resume a run folder with another model than the configuration's."""
    try:
        wanted = _configured(config, _initial_start(config)).architecture
    except UserError:
        # The source of the first start may be gone; a resume needs only the run folder.
        wanted = as_configured(config, found)
    for name in _SHAPE:
        here, there = getattr(found, name), getattr(wanted, name)
        if here != there:
            raise UserError(
                f"run.dir {config.run.dir} holds a checkpoint with {name} {here} ({checkpoint.name}), but the model "
                f"to start from has {there}; use another run.dir, or the model this run began with"
            )
    if found.rope != wanted.rope:
        raise UserError(
            f"run.dir {config.run.dir} was trained under rope {found.rope.type} (factor {found.rope.factor:g}, base "
            f"{found.rope.rope_theta:g}), the configuration says {wanted.rope.type} (factor {wanted.rope.factor:g}, "
            f"base {wanted.rope.rope_theta:g}); start a new run.dir with model.load: {{checkpoint: {config.run.dir}}}"
        )
    if found.layer_windows != wanted.layer_windows:
        raise UserError(
            f"run.dir {config.run.dir} was trained with {_windows(found)}, the configuration says {_windows(wanted)}; "
            f"write that window under attention, or start a new run.dir with model.load: "
            f"{{checkpoint: {config.run.dir}}}"
        )


def _check_same_adapters(config: Config, found: Lora | None, checkpoint: Path) -> None:
    """Refuse adapters of another shape than the configuration's, and configurations that drop or add adapters."""
    wanted = config.lora.shape if config.lora.rank is not None else None
    if wanted != found:
        raise UserError(
            f"lora: {checkpoint} has {found or 'no adapters'}, the configuration says {wanted or 'no adapters'}; write "
            f"the same, or start a new run.dir from the merged model that `megalong checkpoint export --checkpoint "
            f"{checkpoint}` writes"
        )


def _check_same_optimizer(config: Config, meta: Meta, checkpoint: Path) -> None:
    """Refuse an optimizer whose state has another format than the checkpoint's, if the checkpoint records it."""
    sharded, dtype = config.parallel.use_distributed_optimizer, config.precision.params_dtype
    was_sharded = meta.settings.get("parallel.use_distributed_optimizer", sharded)
    was_dtype = meta.settings.get("precision.params_dtype", dtype)
    if was_sharded != sharded:
        key, now, was = "parallel.use_distributed_optimizer", str(sharded).lower(), str(was_sharded).lower()
    elif was_dtype != dtype and not (sharded and meta.optimizer == "fully_reshardable"):
        key, now, was = "precision.params_dtype", dtype, was_dtype
    else:
        return
    raise UserError(
        f"{key} {now}: {checkpoint} was saved with {key} {was}, and its optimizer state cannot be converted; "
        f"write {was}, or start a new run.dir with model.load: {{checkpoint: {config.run.dir}}}"
    )


def _windows(architecture: Architecture) -> str:
    windowed = sum(window is not None for window in architecture.layer_windows)
    if not windowed:
        return "no window"
    size, frequency = architecture.window_size, architecture.window_attn_skip_freq
    if frequency is None:
        return f"window_size {size}"
    shown = frequency if isinstance(frequency, int) else list(frequency)
    return f"window_size {size}, window_attn_skip_freq {shown}"
