"""Where a run starts: its own newest checkpoint, or weights from elsewhere.

It builds nothing, so that a mistake is found before a process is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalong.checkpoint.folder import ASSETS, find_checkpoint, read_meta, whole_checkpoints
from megalong.config.architecture import Architecture
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.hf.config import read_architecture

# What must be equal for a checkpoint's tensors to fit a model; rope and lengths may change.
_SHAPE = (
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Start:
    """Exactly one of `resume`, `checkpoint`, `hf` is set, or none for random weights.

    Attributes:
        architecture: the model to build, with `model.rope` applied.
        assets: folder with the tokenizer and its kin, passed on from checkpoint to checkpoint.
    """

    architecture: Architecture
    resume: Path | None = None
    checkpoint: Path | None = None
    hf: Path | None = None
    assets: Path | None = None


def find_start(config: Config) -> Start:
    """Decide how `config` starts.

    Raises:
        UserError: a folder is missing or damaged, or the run folder's checkpoint has another shape than the model
            the configuration names.
    """
    run = Path(config.run.dir)
    own = whole_checkpoints(run)
    if not own:
        return _first_start(config)
    meta = read_meta(own[-1])
    _check_same_model(config, meta.architecture, own[-1])
    return Start(meta.architecture, resume=own[-1], assets=_assets(own[-1]))


def _first_start(config: Config) -> Start:
    load, override = config.model.load, config.model.rope
    if load is None:
        assert config.model.architecture is not None
        return Start(config.model.architecture.with_rope(override))
    if load.hf is not None:
        folder = Path(load.hf)
        return Start(read_architecture(folder).with_rope(override), hf=folder, assets=folder)
    assert load.checkpoint is not None
    checkpoint = find_checkpoint(load.checkpoint)
    architecture = read_meta(checkpoint).architecture.with_rope(override)
    return Start(architecture, checkpoint=checkpoint, assets=_assets(checkpoint))


def _assets(checkpoint: Path) -> Path | None:
    folder = checkpoint / ASSETS
    return folder if folder.is_dir() else None


def _check_same_model(config: Config, found: Architecture, checkpoint: Path) -> None:
    """Refuse to resume a folder that holds another model than the configuration asks for."""
    try:
        wanted = _first_start(config).architecture
    except UserError:
        # The source of the first start may be gone by now; the run folder is all that a resume needs.
        return
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
