"""The configuration tree: every key, its type, its range and its default.

Names are Megatron's own where it has one. A section validates itself (types, ranges, keys that contradict each other);
rules that span sections are in `checks.py` and run as soon as the tree is whole. What depends on the number of
processes or on the model waits for `checks.check_world` and `checks.check_model`.

    world size = tensor parallel * context parallel * pipeline parallel * data parallel
    global batch = micro-batch * data parallel * micro-batches accumulated
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config import checks
from megalong.config.architecture import NO_WINDOW, Architecture, LayerPattern, Positive
from megalong.config.guard import Guard
from megalong.config.lora import Lora
from megalong.config.mixture import Domain, Pose
from megalong.config.rope import RopeSettings
from megalong.config.section import Section
from megalong.config.sft import Sft
from megalong.config.slurm import Slurm
from megalong.config.split import split_weights

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Run(Section):
    """Which run this is and where it writes; starting it again in the same `dir` resumes it."""

    name: Name
    dir: Text
    seed: int = Field(1234, ge=0, lt=2**32)


class Load(Section):
    """Where weights come from at the first start: a Hugging Face folder, or a run or step of ours.

    Weights and tokenizer are taken over, nothing else: step, learning-rate schedule, optimizer and position in the data
    start fresh. A run whose own folder holds a checkpoint resumes all of these from there and does not read `load`.
    """

    hf: Text | None = None
    checkpoint: Text | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hf is None) == (self.checkpoint is None):
            raise ValueError("give exactly one source: {hf: DIR} or {checkpoint: RUN_OR_STEP}")
        return self


class Model(Section):
    """Weights to start from, or the architecture of a random start; and the positions to train under."""

    load: Load | None = None
    architecture: Architecture | None = None
    rope: RopeSettings | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.load is None and self.architecture is None:
            raise ValueError("nothing to start from: write load: {hf: DIR}, or architecture: for random weights")
        if self.load is not None and self.architecture is not None:
            raise ValueError("load and architecture contradict: loaded weights bring their own shape; drop one of them")
        return self


class Data(Section):
    """What is read: sequence length in tokens, how documents are packed, from which datasets.

    `packing`: `naive` lays documents end to end and lets them see each other; `masked` keeps them apart; so does
    `best_fit`, which cuts none that fits into a sample, and pads; `whole` leaves out those that do not fit, too.
    `pose`: positions of training samples skip ahead; held-out samples keep plain ones.
    `allow_change`: a resume that finds other data than the checkpoint was trained on says so and goes on.
    `loader`: threads of this process (`torch`), or NVIDIA's DALI; both read the same samples in the same order,
    `prefetch` steps ahead of training (0: when they are needed), with `workers` threads or processes a rank.
    """

    seq_length: Positive
    packing: Literal["naive", "masked", "best_fit", "whole"] = "naive"
    separator: Text | None = None
    mixture: tuple[Domain, ...] = Field((), min_length=1, strict=False, validate_default=False)
    split: Text = "99,1"
    allow_change: bool = False
    pose: Pose | None = None
    loader: Literal["torch", "dali"] = "torch"
    prefetch: Count = 2
    workers: Positive = 1

    @property
    def split_weights(self) -> tuple[float, float]:
        """Weights of training and validation."""
        return split_weights(self.split)

    @property
    def masked(self) -> bool:
        """Whether documents, or packs side by side, are kept from seeing each other."""
        return self.packing != "naive" or any(domain.seq_length is not None for domain in self.mixture)

    @property
    def positions(self) -> int:
        """Positions of training samples are below this."""
        return self.seq_length if self.pose is None else self.pose.target_length

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        split_weights(self.split)
        names = [domain.name for domain in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"mixture names {name} twice: every dataset needs a name of its own")
        if self.pose is not None and self.pose.target_length <= self.seq_length:
            raise ValueError(
                f"pose.target_length {self.pose.target_length} is not above data.seq_length {self.seq_length}, so "
                "there is nothing to skip to; write a longer one, or leave pose out"
            )
        if self.pose is not None and self.pose.chunks > self.seq_length:
            raise ValueError(
                f"pose.chunks {self.pose.chunks} is above data.seq_length {self.seq_length}, and every chunk holds a "
                f"token; write {self.seq_length} or less"
            )
        for domain in self.mixture:
            if domain.seq_length is not None and self.seq_length % domain.seq_length:
                raise ValueError(
                    f"mixture: {domain.name}: seq_length {domain.seq_length} does not divide data.seq_length "
                    f"{self.seq_length}, so its packs do not fill a sample; write a divisor, such as "
                    f"{divisor_near(self.seq_length, domain.seq_length)}"
                )
            length = domain.seq_length or self.seq_length
            shortest = domain.synthetic.min_length if domain.synthetic is not None else None
            if shortest is not None and shortest > length:
                where = "its seq_length" if domain.seq_length is not None else "data.seq_length"
                raise ValueError(
                    f"mixture: {domain.name}: synthetic.min_length {shortest} is above {where} "
                    f"{length}, which no document may exceed; write {length} or less"
                )
        return self


def divisor_near(total: int, wanted: int) -> int:
    """The largest divisor of `total` up to `wanted`, or where that is 1, `total` itself."""
    found = next(divisor for divisor in range(min(wanted, total), 0, -1) if total % divisor == 0)
    return found if found > 1 else total


class Parallel(Section):
    """How the model and the sequence are cut; what is left of the world size is data parallel.

    `virtual_pipeline_model_parallel_size` V above 1 interleaves: each pipeline rank holds V parts of the model, layers
    r, r + P, r + 2P, ... in units of layers / (P * V), which shortens the idle time at both ends of a step V times.
    The two p2p switches follow from that unless they are set: an interleaved pipeline overlaps its sends with compute,
    a plain one sends in batches.
    """

    tensor_model_parallel_size: Positive = 1
    context_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    virtual_pipeline_model_parallel_size: Positive = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_p2p_comm: bool | None = None
    batch_p2p_comm: bool | None = None


class Attention(Section):
    """Which kernel computes a block, how context-parallel ranks share attention, and what a token sees.

    `exchange`: keys travel (`ring`), are gathered (`all_gather`), tokens are swapped for heads (`ulysses`), or heads
    within groups of `ulysses_size` neighbouring ranks and keys between them (`ring_ulysses`); `auto` decides by heads,
    lengths and sizes, and says why. `layout`: how tokens lie on the ranks; `auto` is `zigzag` for naive and `balanced`
    for other packings. `window_size`: a token sees that many, itself included; `window_attn_skip_freq` N leaves
    every N-th layer full, a list says 1 (window) or 0 (full) for each layer. Both replace what the model to start from
    was trained with, and become part of the model; left out, its own windows stay.
    """

    backend: Literal["auto", "torch", "transformer_engine"] = "auto"
    exchange: Literal["auto", "ring", "all_gather", "ulysses", "ring_ulysses"] = "auto"
    ulysses_size: Positive | None = None
    layout: Literal["auto", "zigzag", "per_document_zigzag", "balanced"] = "auto"
    window_size: Positive | None = None
    window_attn_skip_freq: Positive | LayerPattern | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.window_attn_skip_freq is not None and self.window_size is None:
            raise ValueError(NO_WINDOW)
        if self.ulysses_size is not None and self.exchange != "ring_ulysses":
            raise ValueError(
                f"ulysses_size {self.ulysses_size} with exchange {self.exchange}: only ring_ulysses has groups of that "
                "size; write exchange: ring_ulysses, or leave ulysses_size out"
            )
        return self


class Precision(Section):
    """Type of the weights and activations, and which matrix products round their operands to FP8.

    Gradients and the optimizer are fp32 in all cases. `fp8`: null, `hybrid` (e4m3 forward, e5m2 for gradients) or
    `e4m3` for both, in the linear layers of every transformer layer; with `fp8_dot_product_attention` in attention too.
    Without a GPU it is emulated, and slower than bf16.
    """

    params_dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: Literal["delayed", "tensorwise"] = "delayed"
    fp8_dot_product_attention: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.fp8_dot_product_attention and self.fp8 is None:
            raise ValueError(
                "fp8_dot_product_attention true without fp8, which names the 8-bit types: write fp8: hybrid, or "
                "fp8_dot_product_attention: false"
            )
        if self.fp8 is not None and self.params_dtype != "bf16":
            raise ValueError(
                f"fp8 {self.fp8} with params_dtype {self.params_dtype}: what 8-bit products are added up to is bf16; "
                "write params_dtype: bf16, or fp8: null"
            )
        return self


class Memory(Section):
    """What backward computes again instead of keeping: nothing, attention only, or whole layers."""

    recompute: Literal["none", "selective", "full"] = "none"


class Optimizer(Section):
    """AdamW and its learning-rate schedule, a function of the step's number (training/optimizer.py).

    Steps 1 to `warmup_iters` rise linearly to `lr`; the last step runs at `min_lr`, or one step before a rate of 0.
    """

    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_iters: Count = 0
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; write min_lr at or below lr")
        return self


class Training(Section):
    """How long and in which batches; batch sizes count sequences of `data.seq_length` tokens."""

    train_iters: Positive
    micro_batch_size: Positive = 1
    global_batch_size: Positive
    gc_interval: Positive = 50


class Checkpoint(Section):
    """When to save (in iterations), how many to keep, and the format of the optimizer's state.

    The newest `keep_last` are kept, and those of steps that `keep_every` divides. With `async_save` training goes on
    while a copy of the state is written; it takes as much host memory as a rank writes. `on_save_failure`: a save that
    the disk does not take ends the run (`stop`), or is told and tried again at the next one (`continue`).

    `fully_reshardable` gathers the optimizer's state over data-parallel ranks at each save, and any layout can load it;
    `dp_reshardable` writes what each rank holds, which is faster, and only data and context parallelism may change.
    """

    save_interval: Positive = 50
    keep_last: Positive = 3
    keep_every: Positive | None = None
    async_save: bool = True
    on_save_failure: Literal["stop", "continue"] = "stop"
    optimizer: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"


class Evaluation(Section):
    """Held-out loss every `interval` iterations (0: never) over `iters` global batches."""

    interval: Count = 0
    iters: Positive = 8


class Logging(Section):
    """What is written while training."""

    tensorboard: bool = True
    log_interval: Positive = 1
    position_buckets: bool = True


class Runtime(Section):
    """Where it runs, and how long a collective may take before the run is given up.

    On GPUs the last `flight_recorder_events` collectives of every group are dumped to RUN/nccl when that happens.
    `watchdog_minutes` without a finished step end the run with every rank's stack in RUN/stacks: half of
    `timeout_minutes` unless set, 0 for never. After SIGTERM or SIGUSR1 the step at work is finished, or dropped if it
    would take more than `signal_grace_seconds`; after SLURM's warning, half of `slurm.lead_minutes`.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(default=60.0, gt=0)
    flight_recorder_events: Count = 2000
    watchdog_minutes: float | None = Field(default=None, ge=0)
    signal_grace_seconds: float = Field(default=20.0, ge=0)

    @property
    def hang_minutes(self) -> float:
        """Minutes without a finished step that are taken for a hang; 0: none are."""
        return self.timeout_minutes / 2 if self.watchdog_minutes is None else self.watchdog_minutes


class Config(Section):
    """A whole run, or one stage of it."""

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
    def world_divisor(self) -> int:
        """TP * CP * PP: the number of processes one replica of the model takes."""
        parallel = self.parallel
        return (
            parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
        )

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens one optimizer step learns from: global batch * sequence length."""
        return self.training.global_batch_size * self.data.seq_length

    @property
    def token_layout(self) -> Literal["zigzag", "per_document_zigzag", "balanced"]:
        """How tokens lie on context-parallel ranks: `attention.layout`, with `auto` decided by the packing."""
        if self.attention.layout != "auto":
            return self.attention.layout
        return "balanced" if self.data.masked else "zigzag"

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model on `world_size` processes; `UserError` where they do not come out even."""
        checks.check_replicas(self, world_size)
        return world_size // self.world_divisor

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        checks.check_config(self)
        return self
