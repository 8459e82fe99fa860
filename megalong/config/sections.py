"""The sections of a configuration: every key, its type, its range and its default.

Names are Megatron's own where it has one. A section validates itself (types, ranges, keys that contradict each other).
Rules that span sections are in `checks.py`; `schema.Config` applies them.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.architecture import Architecture, Positive
from megalong.config.compute import FP8_TOKENS, Attention, Memory, Parallel, Precision
from megalong.config.data import Data
from megalong.config.guard import Guard
from megalong.config.lora import Lora
from megalong.config.rope import RopeSettings
from megalong.config.section import Section
from megalong.config.sft import Sft
from megalong.config.slurm import Slurm
from megalong.runtime.grid import Grid

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Run(Section):
    """Name, folder and seed of a run."""

    name: Name
    """Name of the run: letters, digits, `.`, `_` and `-`. Example: `my-1m`"""
    dir: Text
    """Run folder: checkpoints, logs, TensorBoard files. A start in a folder that holds checkpoints resumes. Example:
    `runs/my-1m`
    """
    seed: int = Field(1234, ge=0, lt=2**32)
    """Seed of random weights and of the data order."""


class Load(Section):
    """Where weights come from at the first start: a Hugging Face folder, or a run of megalong or one of its steps.

    Only weights and tokenizer are loaded: step, learning-rate schedule, optimizer and position in the data start fresh.
    A run whose own folder contains a checkpoint resumes all of these from there and does not read `load`.
    """

    hf: Text | None = None
    """Hugging Face folder. Example: `checkpoints/Llama-3.1-8B-Instruct`"""
    checkpoint: Text | None = None
    """A run folder (its last step), or the folder of one step. Example: `runs/base`"""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hf is None) == (self.checkpoint is None):
            raise ValueError("give exactly one source: {hf: DIR} or {checkpoint: RUN_OR_STEP}")
        return self


class Model(Section):
    """Initial weights, or the architecture of a random start; and RoPE scaling."""

    load: Load | None = None
    """Where weights come from at the first start. Example: `{hf: checkpoints/Llama-3.1-8B-Instruct}`"""
    architecture: Architecture | None = None
    """Shape of a model with random weights, instead of `load`. Example: `{hidden_size: 64, ffn_hidden_size: 128,
    num_layers: 2, num_attention_heads: 4, num_query_groups: 2, vocab_size: 512, max_position_embeddings: 256, rope:
    {rope_theta: 10000.0}}`
    """
    rope: RopeSettings | None = None
    """RoPE scaling that replaces the model's own; left out, the model keeps its own. Example: `{type: yarn, factor:
    16}`
    """
    allow_extrapolation: bool = False
    """Allow positions that the model's RoPE does not cover, or an original length other than the model's."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.load is None and self.architecture is None:
            raise ValueError("nothing to start from: write load: {hf: DIR}, or architecture: for random weights")
        if self.load is not None and self.architecture is not None:
            raise ValueError("load and architecture contradict: loaded weights bring their own shape; drop one of them")
        return self


class Optimizer(Section):
    """AdamW and its learning-rate schedule, a function of the step number (training/optimizer.py)."""

    lr: float = Field(gt=0)
    """Peak learning rate. Example: `3.0e-5`"""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate of the last step. If 0, the schedule ends one step later, so the last step still updates weights.
    """
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the decay from `lr` to `min_lr`."""
    warmup_iters: Count = 0
    """Steps of linear warm-up."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; not applied to norms and biases."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 disables clipping."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; write min_lr at or below lr")
        return self


class Training(Section):
    """Number of steps and batch sizes, in sequences of `data.seq_length` tokens."""

    train_iters: Positive
    """Optimizer steps of the whole run, resumes included. Example: `120`"""
    micro_batch_size: Positive = 1
    """Sequences per forward and backward pass of one model replica."""
    global_batch_size: Positive
    """Sequences per optimizer step; a multiple of micro-batch × data parallel size. Example: `8`"""
    gc_interval: Positive = 50
    """Steps between Python garbage collections, on all ranks at once."""


class Checkpoint(Section):
    """When to save, how many checkpoints to keep, and the format of the optimizer state."""

    save_interval: Positive = 50
    """Steps between saves. The last step is always saved."""
    keep_last: Positive = 3
    """Number of newest checkpoints to keep."""
    keep_every: Positive | None = None
    """Also keep every step that this divides. Example: `500`"""
    async_save: bool = True
    """Write in the background; needs host memory for a copy of what each rank writes."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """`stop` ends the run when a save fails; `continue` logs it and tries again at the next save."""
    optimizer: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """Format of the optimizer state. Any layout can load `fully_reshardable`. `dp_reshardable` stores Megatron-Core's
    own buffers; then only data and context parallelism may change. Both are equally fast: each rank writes what it
    holds.
    """


class Evaluation(Section):
    """Loss on held-out documents during training."""

    interval: Count = 0
    """Steps between evaluations; 0 disables them."""
    iters: Positive = 8
    """Global batches per evaluation."""


class Logging(Section):
    """What is written during training."""

    tensorboard: bool = True
    """Write TensorBoard files to `RUN/tensorboard`."""
    log_interval: Positive = 1
    """Steps between log lines."""
    position_buckets: bool = True
    """Also write the loss by position, in powers of two."""


class Runtime(Section):
    """Device, time-outs and reaction to signals."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA if there is a GPU."""
    timeout_minutes: float = Field(default=60.0, gt=0)
    """Time limit of a collective; after it the run ends."""
    flight_recorder_events: Count = 2000
    """NCCL collectives that each rank records and writes to `RUN/nccl` after a time-out."""
    watchdog_minutes: float | None = Field(default=None, ge=0)
    """End the run, with every rank's stacks in `RUN/stacks`, after this time without a finished step. Default: half of
    `timeout_minutes`; 0 disables it. Example: `20`
    """
    signal_grace_seconds: float = Field(default=20.0, ge=0)
    """After SIGTERM, SIGUSR1 or Ctrl-C, a step that would take longer than this is dropped. After SLURM's warning the
    limit is half of `slurm.lead_minutes`. A second Ctrl-C ends the run at once, without a save.
    """

    @property
    def hang_minutes(self) -> float:
        """Minutes without a finished step that count as a hang; 0: never."""
        return self.timeout_minutes / 2 if self.watchdog_minutes is None else self.watchdog_minutes


class Sections(Section):
    """All sections of a run, each valid by itself."""

    task: Literal["pretrain", "sft"] = "pretrain"
    run: Run
    model: Model
    lora: Lora = Lora()
    data: Data
    sft: Sft = Sft()
    parallel: Parallel = Parallel()
    attention: Attention = Attention()
    precision: Precision = Precision()
    memory: Memory = Memory()
    optimizer: Optimizer
    training: Training
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    runtime: Runtime = Runtime()
    slurm: Slurm = Slurm()

    @property
    def grid(self) -> Grid:
        """How ranks share the model; whether they share attention by heads depends on the model (`resolved.py`)."""
        parallel = self.parallel
        return Grid(
            parallel.tensor_model_parallel_size,
            parallel.context_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
        )

    @property
    def length_multiple(self) -> int:
        """The length of a padded sample must be a multiple of this, in addition to what its token layout needs.

        Sequence parallelism splits a context-parallel shard over the tensor-parallel ranks, and FP8 matrices on a GPU
        need a rank's number of tokens to be a multiple of 8.
        """
        multiple = (FP8_TOKENS if self.precision.fp8 is not None else 1) * self.parallel.context_parallel_size
        return multiple * self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else multiple

    @property
    def token_layout(self) -> Literal["zigzag", "per_document_zigzag", "balanced"]:
        """Which tokens each context-parallel rank has: `attention.layout`, with `auto` decided by the packing."""
        if self.attention.layout != "auto":
            return self.attention.layout
        return "balanced" if self.data.masked else "zigzag"
