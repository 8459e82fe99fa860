"""Limits of attention backends and precisions, on this machine or on any, with the nearest setting that works.

`check_attention` needs only the configuration and runs when the file is read; `check_machine` runs when a process knows
its device. Neither needs torch. Transformer Engine's limits are those of version 2.20, taken from its sources. Without
these checks it would fail in the middle of the first step.
"""

from dataclasses import dataclass

from megalong.config.architecture import Architecture
from megalong.config.sections import Sections
from megalong.errors import UserError

TORCH, ENGINE = "torch", "transformer_engine"
FP8_CAPABILITY, FP8_ATTENTION_CAPABILITY, FP8_CURRENT_ATTENTION_CAPABILITY = (8, 9), (9, 0), (10, 0)
HOPPER_FP8_HEAD = 128  # channels
FP8_WIDTH = 16  # Transformer Engine needs both sides of a matrix to be multiples of this


@dataclass(frozen=True)
class Machine:
    """A process's GPU (compute capability; None: no GPU), and whether Transformer Engine can be imported.

    `engine_recipe` is the environment's NVTE_DPA_FP8_RECIPE, which overrides the recipe for attention.
    """

    capability: tuple[int, int] | None = None
    has_engine: bool = False
    engine_recipe: str = ""


def check_attention(config: Sections) -> None:
    """Refuse settings that no machine supports."""
    if config.attention.window_size is not None:
        check_window(config, f"attention.window_size {config.attention.window_size}", ", or leave window_size out")
    if config.attention.backend == ENGINE:
        if config.runtime.device == "cpu":
            raise _engine_needs("a GPU, and runtime.device is cpu")
        _check_engine(config)


def check_window(config: Sections, window: str, fix: str = "") -> None:
    """Refuse settings that no kernel supports with a sliding window, the configuration's or the loaded model's.

    `window` names the window in the message, `fix` is an additional fix.
    """
    if config.precision.fp8_dot_product_attention:
        raise UserError(
            f"precision.fp8_dot_product_attention true with {window}: FP8 kernels have no sliding window; write "
            f"fp8_dot_product_attention: false{fix}"
        )
    attention = config.attention
    shared = config.parallel.context_parallel_size > 1
    if shared and attention.backend == ENGINE and attention.exchange not in ("all_gather", "ulysses"):
        raise UserError(
            f"attention.exchange: {attention.exchange} with {window} and attention.backend: {ENGINE}: it supports "
            f"sliding windows only with all_gather and ulysses; write exchange: all_gather, or ulysses{fix}"
        )


def check_machine(config: Sections, machine: Machine) -> None:
    """Refuse settings that this machine does not support.

    Raises:
        UserError: it names the key, what is missing and what to write.
    """
    attention, precision = config.attention, config.precision
    if attention.backend == ENGINE and machine.capability is None:
        raise _engine_needs("a GPU, and there is none here")
    if attention.backend == ENGINE and not machine.has_engine:
        raise _engine_needs("the package transformer-engine, which cannot be imported here (megalong doctor)")
    if precision.fp8 is None or machine.capability is None:
        return
    _check_fp8_on_gpu(config, machine, machine.capability)
    if attention_backend(config, machine) == ENGINE:
        _check_engine(config)


def attention_backend(config: Sections, machine: Machine) -> str:
    """`attention.backend` with `auto` decided: Transformer Engine for FP8 attention on a GPU, else torch."""
    if config.attention.backend != "auto":
        return config.attention.backend
    return ENGINE if config.precision.fp8_dot_product_attention and machine.capability is not None else TORCH


def _engine_needs(what: str) -> UserError:
    return UserError(f"attention.backend: transformer_engine needs {what}; write backend: auto, or torch")


def _check_fp8_on_gpu(config: Sections, machine: Machine, capability: tuple[int, int]) -> None:
    precision, name = config.precision, ".".join(map(str, capability))
    if not machine.has_engine:
        raise UserError(
            f"precision.fp8: {precision.fp8} on a GPU needs the package transformer-engine, which cannot be imported "
            "here (megalong doctor); install it, or write fp8: null"
        )
    if capability < FP8_CAPABILITY:
        raise UserError(
            f"precision.fp8: {precision.fp8}, but this GPU (compute capability {name}) has no FP8, which needs 8.9; "
            "write fp8: null"
        )
    if not precision.fp8_dot_product_attention:
        return
    if config.attention.backend == "torch":
        raise UserError(
            "attention.backend: torch has no FP8 kernel on a GPU, and precision.fp8_dot_product_attention is true; "
            "write backend: transformer_engine, or fp8_dot_product_attention: false"
        )
    if capability < FP8_ATTENTION_CAPABILITY:
        raise UserError(
            f"precision.fp8_dot_product_attention: this GPU (compute capability {name}) has no FP8 attention, which "
            "needs 9.0; write fp8_dot_product_attention: false, which keeps FP8 in the linear layers"
        )
    if config.data.masked:
        packs = config.data.packing == "naive"
        raise UserError(
            f"precision.fp8_dot_product_attention with {'seq_length in data.mixture' if packs else 'data.packing '}"
            f"{'' if packs else config.data.packing}: FP8 kernels have no document masks; write "
            f"fp8_dot_product_attention: false, or {'leave it out there' if packs else 'packing: naive'}"
        )
    _check_engine_length(config, "precision.fp8_dot_product_attention")
    delayed = precision.fp8_recipe == "delayed" or machine.engine_recipe == "DelayedScaling"
    if capability < FP8_CURRENT_ATTENTION_CAPABILITY and not delayed:
        raise UserError(
            f"precision.fp8_recipe: {precision.fp8_recipe} with fp8_dot_product_attention: FP8 attention on this GPU "
            f"(compute capability {name}) supports delayed scaling only; write fp8_recipe: delayed, or set "
            "NVTE_DPA_FP8_RECIPE=DelayedScaling in the environment, which keeps the linear layers tensorwise"
        )


def check_fp8_model(config: Sections, machine: Machine, architecture: Architecture) -> None:
    """Refuse a model that FP8 on this machine's GPU does not support.

    Raises:
        UserError: a head dimension that Hopper's FP8 attention does not support, or matrix sides that are not multiples
            of 16.
    """
    precision, capability = config.precision, machine.capability
    if precision.fp8 is None or capability is None:
        return
    channels = architecture.kv_channels
    on_hopper = FP8_ATTENTION_CAPABILITY <= capability < FP8_CURRENT_ATTENTION_CAPABILITY
    if precision.fp8_dot_product_attention and on_hopper and channels != HOPPER_FP8_HEAD:
        raise UserError(
            f"precision.fp8_dot_product_attention: on this GPU, FP8 attention trains heads of {HOPPER_FP8_HEAD} "
            f"channels only, and the model's have {channels}; write fp8_dot_product_attention: false"
        )
    tensor = config.parallel.tensor_model_parallel_size
    for what, size in (
        ("hidden_size", architecture.hidden_size),
        ("hidden_size / tensor parallel", architecture.num_attention_heads * channels // tensor),
        ("ffn_hidden_size / tensor parallel", architecture.ffn_hidden_size // tensor),
    ):
        if size % FP8_WIDTH:
            raise UserError(
                f"precision.fp8: {precision.fp8}: the model's {what} is {size}, and FP8 matrices need multiples of "
                f"{FP8_WIDTH}; write fp8: null, or a smaller parallel.tensor_model_parallel_size"
            )


def _check_engine(config: Sections) -> None:
    """Refuse what Transformer Engine's attention does not support, alone and over context-parallel ranks."""
    attention, ranks = config.attention, config.parallel.context_parallel_size
    who = "attention.backend: transformer_engine"
    if config.precision.params_dtype != "bf16":
        raise UserError(
            f"{who} computes in bf16, and precision.params_dtype is {config.precision.params_dtype}; write bf16, or "
            "backend: torch"
        )
    if ranks == 1:
        return
    documents = config.data.masked
    layout = "per_document_zigzag" if documents else "zigzag"
    fits = ("per_document_zigzag",) if documents else ("auto", "zigzag", "per_document_zigzag")
    if attention.layout not in fits:
        raise UserError(
            f"attention.layout: {attention.layout} with {who}: with data.packing {config.data.packing} it needs the "
            f"layout {layout}; write layout: {layout}, or backend: torch"
        )
    _check_engine_length(config, who)


def _check_engine_length(config: Sections, who: str) -> None:
    parallel, length = config.parallel, config.data.seq_length
    divisor = 2 * parallel.context_parallel_size
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size % 2 == 0:
        divisor = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    elif parallel.sequence_parallel:
        divisor *= parallel.tensor_model_parallel_size
    if length % divisor:
        raise UserError(
            f"data.seq_length {length} is not a multiple of {divisor}, which {who} needs on "
            f"{parallel.context_parallel_size} context-parallel ranks; write {-(-length // divisor) * divisor}, or "
            "backend: torch"
        )
