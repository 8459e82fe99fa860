"""Which positions a run trains, and which positions the RoPE of its model covers.

A model reads positions 0 to L - 1 well because it was trained on them. Beyond L, slow channel pairs rotate by angles
that they were never trained on, and the loss is that of a broken model on any data. Covered positions:

    model.rope left out      the model's own length: max_position_embeddings of its config.json, or factor * original if
                             its scaling states an original length and that is longer (except llama3)
    linear, ntk, yarn,       factor * original; original is the model's own length before any scaling
    llama3
    none, rope_theta raised  all that the run trains: a base change (ABF) slows every pair and states no length
    none otherwise           the model's own length before any scaling, because its scaling is removed

Raising the base together with a factor does not change this: the factor states the length. Positions restart at every
masked document, so conversations of `sft.max_length` tokens need no more positions than that in packs of any length.
Random weights were never trained on any position: `max_position_embeddings` is the run's own statement and must cover
what it trains. `model.allow_extrapolation` allows positions and original lengths that are refused here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megalong.errors import UserError

if TYPE_CHECKING:
    from megalong.config.architecture import Architecture
    from megalong.config.schema import Config

_PACKS = "seq_length of data.mixture"
_ALLOW = "model.allow_extrapolation: true trains anyway"


def trained_positions(config: Config) -> tuple[int, str]:
    """How many positions the samples of a run use at most, and the key that decides it."""
    data = config.data
    if data.pose is not None:
        return data.pose.target_length, "data.pose.target_length"
    if config.task == "sft" and config.sft.max_length is not None:
        return config.sft.max_length, "sft.max_length"
    packs = [domain.seq_length for domain in data.mixture if domain.seq_length is not None]
    if packs and len(packs) == len(data.mixture):
        return max(packs), _PACKS
    return data.seq_length, "data.seq_length"


def covered_positions(architecture: Architecture) -> int:
    """Positions that a model's RoPE covers.

    With a yarn or linear factor, `max_position_embeddings` of published models is the length before or after scaling;
    the longer one is meant. Llama 3.2 states 131072 with factor 32 of 8192, and means 131072.
    """
    rope, longest = architecture.rope, architecture.max_position_embeddings
    if rope.type == "llama3" or rope.original_max_position_embeddings is None:
        return longest
    return max(longest, round(rope.factor * rope.original_max_position_embeddings))


def trained_architecture(config: Config, source: Architecture) -> Architecture:
    """`source` with `model.rope`, as a model trained on the positions of the run. Idempotent.

    After a base change, or beyond what llama3 scaling covers, `max_position_embeddings` becomes the trained length,
    also in an export. With other scalings every reader derives the length from the factor, so it stays.
    """
    architecture, positions = source.with_rope(config.model.rope), trained_positions(config)[0]
    if architecture.rope.type not in ("none", "llama3") or positions <= architecture.max_position_embeddings:
        return architecture
    return architecture.model_copy(update={"max_position_embeddings": positions})


def check_positions(config: Config, source: Architecture) -> None:
    """Refuse positions that the RoPE does not cover, and a `model.rope` that contradicts the model.

    Args:
        source: the model as it is loaded, before `model.rope`.

    Raises:
        UserError: with the factor, the length or the key to write.
    """
    rope, positions = config.model.rope, trained_positions(config)[0]
    scratch = config.model.load is None
    if rope is not None and rope.type != "none" and "factor" not in rope.model_fields_set:
        factor = _factor(positions, rope.original_max_position_embeddings or source.original_length)
        fix = f"write factor: {factor}" if factor > 1 else f"the run needs only {positions}, so leave model.rope out"
        raise UserError(
            f"model.rope: type {rope.type} without factor, and the model reads {source.original_length} positions "
            f"before any scaling; {fix}"
        )
    if config.model.allow_extrapolation:
        return
    if not scratch:
        _refuse_other_original(config, source)
    if rope is not None and _raises_base(config, source) and rope.type == "none" and not scratch:
        return
    refuse_uncovered(config, source.with_rope(rope), source.original_length)


def refuse_uncovered(config: Config, architecture: Architecture, original: int | None = None) -> None:
    """Refuse a run whose samples use positions that `architecture`, the model it trains, does not cover.

    Args:
        original: the model's length before any scaling; None: `architecture`'s own.
    """
    (positions, key), covered = trained_positions(config), covered_positions(architecture)
    if positions <= covered or config.model.allow_extrapolation:
        return
    rope = architecture.rope
    what = f"rope {rope.type} of factor {rope.factor:g} covers" if rope.type != "none" else "the model reads"
    shorter = "shorter packs" if key == _PACKS else f"{key}: {covered}"
    raise UserError(
        f"{key} {positions}: {what} {covered} positions, and those beyond have never been trained; write "
        f"{_fix(config, architecture, positions, original or architecture.original_length)}, or {shorter}"
    )


def _fix(config: Config, architecture: Architecture, positions: int, original: int) -> str:
    rope, override = architecture.rope, config.model.rope
    factor = _factor(positions, rope.original_max_position_embeddings or original)
    if override is not None and rope.type != "none":
        return f"model.rope.factor: {factor} ({_ALLOW})"
    if config.model.load is not None:
        return f"model.rope: {{type: yarn, factor: {factor}}} (or a rope_theta above {rope.rope_theta:g}; {_ALLOW})"
    longer = f"model.architecture.max_position_embeddings: {positions}"
    return longer if rope.type == "none" else f"{longer} and model.architecture.rope.factor: {factor}"


def _refuse_other_original(config: Config, source: Architecture) -> None:
    """Refuse an original length that is neither the model's own nor the length it was extended to."""
    stated = config.model.rope.original_max_position_embeddings if config.model.rope is not None else None
    own = source.original_length
    if stated is None or stated in (own, source.max_position_embeddings):
        return
    longer = source.max_position_embeddings
    scaled = f" ({longer} with its own rope {source.rope.type})" if longer != own else ""
    raise UserError(
        f"model.rope.original_max_position_embeddings {stated}: the model says that it was trained on {own} positions "
        f"before any scaling{scaled}; write {own}, or leave it out (if the model is wrong, {_ALLOW})"
    )


def _raises_base(config: Config, source: Architecture) -> bool:
    rope, own = config.model.rope, source.rope.rope_theta
    return rope is not None and rope.rope_theta is not None and own is not None and rope.rope_theta > own


def _factor(positions: int, original: int) -> int:
    """The smallest whole factor that extends `original` to `positions`."""
    return math.ceil(positions / original)
