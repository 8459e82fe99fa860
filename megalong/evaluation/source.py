"""What is measured and on what: a model by its folder, held-out sequences by a dataset's prefix. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megalong.checkpoint.folder import ASSETS, find_checkpoint, read_meta
from megalong.config.architecture import Architecture
from megalong.config.lora import Lora
from megalong.config.positions import covered_positions
from megalong.data.sampler import PackedSamples
from megalong.data.tokenizer_check import check_tokenizers
from megalong.errors import UserError
from megalong.hf.config import read_architecture

SHUFFLE_SEED = 1234  # one order of documents for every model measured


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from; exactly one of `checkpoint` (a step's folder) and `hf` is set.

    `architecture.torch_dtype` is the type to compute in, `why` who says so; `lora` is what the checkpoint's adapters
    are, None where it has none.
    """

    architecture: Architecture
    checkpoint: Path | None = None
    hf: Path | None = None
    lora: Lora | None = None
    why: str = ""

    def __str__(self) -> str:
        return str(self.checkpoint or self.hf)

    @property
    def tokenizer(self) -> Path:
        """Where its tokenizer is, if it has one."""
        return self.checkpoint / ASSETS if self.checkpoint is not None else self.hf or Path()

    @property
    def name(self) -> str:
        """The run's name, or the folder's: what tables and pictures call this model."""
        folder = (self.checkpoint or self.hf or Path()).resolve()
        return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def find_model(
    checkpoint: str | Path | None = None, hf: str | Path | None = None, dtype: str | None = None
) -> ModelSource:
    """The model of a run (its newest step), of one step's folder, or of a Hugging Face folder.

    It is computed in `dtype` (float32, bfloat16, float16), or where None in the type it was trained in, which for a
    Hugging Face folder is what config.json says.

    Raises:
        UserError: not exactly one was given, or it is no model.
    """
    if (checkpoint is None) == (hf is None):
        raise UserError("give exactly one model: --checkpoint CKPT_OR_RUN or --hf DIR")
    if hf is not None:
        architecture = read_architecture(hf)
        return _in_dtype(ModelSource(architecture, hf=Path(hf), why="as its config.json says"), dtype)
    assert checkpoint is not None
    folder = find_checkpoint(checkpoint)
    meta = read_meta(folder)
    architecture = meta.architecture.model_copy(update={"torch_dtype": meta.dtype})
    why = "as trained" if meta.optimizer is not None else "as imported"
    return _in_dtype(ModelSource(architecture, checkpoint=folder, lora=meta.lora, why=why), dtype)


def _in_dtype(source: ModelSource, dtype: str | None) -> ModelSource:
    if dtype is None:
        return source
    architecture = source.architecture.model_copy(update={"torch_dtype": dtype})
    own = source.architecture.torch_dtype
    return replace(source, architecture=architecture, why=f"as --dtype says, instead of {own} {source.why}")


def beyond_trained(source: ModelSource, tokens: int, key: str) -> str | None:
    """What to say of a length that the model's positions do not cover; None where they do.

    Measuring and generating there is no mistake, as training would be: seeing where a model ends can be the point.
    """
    covered = covered_positions(source.architecture)
    if tokens <= covered:
        return None
    return (
        f"{key}: {tokens} positions are used, and the rope of {source} ({source.architecture.rope.type}) covers "
        f"{covered}: expect bad predictions beyond"
    )


@dataclass(frozen=True)
class _Dataset:
    """What `PackedSamples` asks of an entry of a mixture."""

    name: str
    path: str
    weight: float = 1.0
    lengths: None = None


def open_held_out(
    data: str, seq_length: int, samples: int, source: ModelSource, allow_other_tokenizer: bool = False
) -> PackedSamples:
    """The dataset taken whole and packed, with at least `samples` sequences in it.

    Raises:
        UserError: no such dataset, too few tokens, ids the model does not have, or another tokenizer's.
    """
    vocabulary = source.architecture.vocab_size
    packed = PackedSamples([_Dataset(Path(data).name, data)], seq_length, SHUFFLE_SEED, "1,0", vocabulary=vocabulary)
    held = packed.describe(samples)[0].tokens_per_epoch // seq_length
    if samples > held:
        mend = f"write --samples {held}" if held else "write a shorter --seq-length"
        raise UserError(f"--samples {samples}: {data} holds only {held} samples of {seq_length} tokens; {mend}")
    if (packed.vocabulary_size or 0) > source.architecture.vocab_size:
        raise UserError(
            f"--data {data}: tokenized with a vocabulary of {packed.vocabulary_size}, but {source} has "
            f"{source.architecture.vocab_size}; preprocess it with the model's own tokenizer"
        )
    packed.refuse_foreign_ids(vocabulary)
    tokenizer_notes(packed, source, allow_other_tokenizer)
    return packed


def tokenizer_notes(packed: PackedSamples, source: ModelSource, allow_other_tokenizer: bool = False) -> list[str]:
    """What is not known of the tokenizers of data and model, or was let through.

    Raises:
        UserError: they are others, and that is not allowed.
    """
    made = [
        replace(one, name=f"--data {entry.path}") for one, entry in zip(packed.made_with(), packed.mixture, strict=True)
    ]
    return check_tokenizers(made, source.tokenizer, "--allow-other-tokenizer", allow_other_tokenizer)
