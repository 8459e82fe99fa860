"""Models and texts to measure: models by their folders; a text by a prefix, or by what a run held out. Needs no torch.

A text has a name, which plots show: the meaning of a perplexity depends on whether a run was trained on the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from megalong.checkpoint.folder import ASSETS, FOLDER, find_checkpoint, read_meta
from megalong.config.architecture import Architecture
from megalong.config.explain import explain
from megalong.config.load import load_config
from megalong.config.lora import Lora
from megalong.config.positions import covered_positions
from megalong.config.rope import RopeSettings
from megalong.config.text import parse_yaml
from megalong.data.fingerprint import dataset_digest
from megalong.data.samples.sampler import PackedSamples
from megalong.data.tokenizer_check import check_tokenizers
from megalong.errors import UserError
from megalong.hf.config import read_architecture

SHUFFLE_SEED = 1234  # one order of documents for every model measured
_FILES = re.compile(r"data\.mixture\.(.+)\.files")
ModelOption = tuple[Literal["checkpoint", "hf", "rope"], str]  # a command-line option for a model or its RoPE scaling


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from; exactly one of `checkpoint` (a step's folder) and `hf` is set.

    Attributes:
        architecture: with the RoPE scaling to measure; its `torch_dtype` is the type to compute in.
        lora: the checkpoint's adapters; None without adapters.
        why: the reason for that type.
        rope: short description of the RoPE scaling if it is not the model's own, else empty.
        trained_on: digests of the datasets of the run that wrote the checkpoint, by domain.
    """

    architecture: Architecture
    checkpoint: Path | None = None
    hf: Path | None = None
    lora: Lora | None = None
    why: str = ""
    rope: str = ""
    trained_on: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.checkpoint or self.hf)

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer, if it has one."""
        return self.checkpoint / ASSETS if self.checkpoint is not None else self.hf or Path()

    @property
    def run(self) -> Path | None:
        """The folder of the run that contains the checkpoint."""
        folder = self.checkpoint.resolve() if self.checkpoint is not None else None
        return folder.parent.parent if folder is not None and folder.parent.name == FOLDER else None

    @property
    def name(self) -> str:
        """The name in tables and plots: the run's or the folder's."""
        return self.names[0]

    @property
    def names(self) -> list[str]:
        """Possible names, the shortest first; longer ones are used if another model has the same."""
        folder = (self.run or self.checkpoint or self.hf or Path()).resolve()
        step = self.checkpoint.resolve().name if self.run is not None and self.checkpoint is not None else ""
        rope = f" ({self.rope})" if self.rope else ""
        short, far = folder.name, f"{folder.parent.name}/{folder.name}"
        at_step = f" step {int(step.removeprefix('step-'))}" if step else ""
        return [short + rope, short + at_step + rope, far + rope, far + at_step + rope, str(folder) + at_step + rope]


def distinct_names(sources: Sequence[ModelSource]) -> list[str]:
    """A different name for each model; if a model appears twice, its names are numbered."""
    for names in zip(*(source.names for source in sources), strict=True):
        if len(set(names)) == len(names):
            return list(names)
    long = [source.names[-1] for source in sources]
    return [f"{name} ({1 + long[:at].count(name)})" for at, name in enumerate(long)]


def find_models(options: Sequence[ModelOption], dtype: str | None = None) -> list[ModelSource]:
    """The models of a command line, in order; `("rope", …)` applies to the model before it, or to all if it is first.

    Raises:
        UserError: no model, a folder without a model, or an invalid scaling.
    """
    everywhere: str | None = None
    models: list[tuple[ModelOption, str | None]] = []
    for one in options:
        if one[0] != "rope":
            models.append((one, None))
        elif models:
            models[-1] = models[-1][0], one[1]
        else:
            everywhere = one[1]
    if not models:
        raise UserError("give a model: --checkpoint CKPT_OR_RUN or --hf DIR, and any number of others to compare")
    found = []
    for (kind, path), own in models:
        source = find_model(**{kind: path}, dtype=dtype)
        text = own if own is not None else everywhere
        found.append(source if text is None else _with_rope(source, text))
    return found


def _with_rope(source: ModelSource, text: str) -> ModelSource:
    """The model with the RoPE scaling of `--rope TEXT`."""
    values = parse_yaml(text, "--rope")
    if not isinstance(values, dict):
        raise UserError(f"--rope {text}: not a section; write for example --rope '{{type: yarn, factor: 4}}'")
    try:
        rope = RopeSettings.model_validate(values)
    except ValidationError as error:
        raise explain(error, RopeSettings, lambda key: "--rope") from None
    description = rope.type if rope.factor == 1 else f"{rope.type} × {rope.factor:g}"
    if rope.rope_theta is not None:
        description += f", base {rope.rope_theta:g}"
    return replace(source, architecture=source.architecture.with_rope(rope), rope=description)


def find_model(
    checkpoint: str | Path | None = None, hf: str | Path | None = None, dtype: str | None = None
) -> ModelSource:
    """The model of a run (its newest step), of one step's folder, or of a Hugging Face folder.

    It is computed in `dtype` (float32, bfloat16, float16), or if None in the type that it was trained in; for a Hugging
    Face folder that is the type in config.json.

    Raises:
        UserError: not exactly one was given, or it is not a model.
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
    trained_on = {match[1]: str(digest) for key, digest in meta.data.items() if (match := _FILES.fullmatch(key))}
    source = ModelSource(architecture, checkpoint=folder, lora=meta.lora, why=why, trained_on=trained_on)
    return _in_dtype(source, dtype)


def _in_dtype(source: ModelSource, dtype: str | None) -> ModelSource:
    if dtype is None:
        return source
    architecture = source.architecture.model_copy(update={"torch_dtype": dtype})
    own = source.architecture.torch_dtype
    return replace(source, architecture=architecture, why=f"as --dtype says, instead of {own} {source.why}")


def beyond_trained(source: ModelSource, tokens: int, key: str) -> str | None:
    """A warning if the model's RoPE does not cover `tokens` positions; else None.

    Unlike in training, this is not an error: a measurement may be meant to show where a model breaks.
    """
    covered = covered_positions(source.architecture)
    if tokens <= covered:
        return None
    return (
        f"{key}: {tokens} positions are used, and the rope of {source} ({source.architecture.rope.type}) covers "
        f"{covered}: expect bad predictions beyond that"
    )


@dataclass(frozen=True)
class Dataset:
    """An entry of a mixture, as `PackedSamples` needs it."""

    name: str
    path: str
    weight: float = 1.0
    lengths: None = None


@dataclass(frozen=True)
class Text:
    """A text to measure on.

    Attributes:
        name: name in plots.
        key: the option that named it.
        split, part: which documents of each dataset, see `PackedSamples`.
        notes: warnings about it.
    """

    name: str
    key: str
    datasets: tuple[Dataset, ...]
    split: str = "1,0"
    part: str = "train"
    notes: tuple[str, ...] = ()


def given_text(data: str, models: Iterable[ModelSource] = ()) -> Text:
    """A whole dataset; its name lists those of `models` that were trained on it."""
    name, digest, notes, runs = Path(data).name, dataset_digest(data), [], []
    for model in models:
        for domain in [domain for domain, found in model.trained_on.items() if found == digest]:
            run = model.run or model.checkpoint
            runs.append(model.name)
            notes.append(
                f"--data {data}: {run} was trained on it (data.mixture: {domain}), so it is not held-out text; write "
                f"--held-out {domain} for the documents that it has not seen"
            )
    seen_by = f" (training data of {', '.join(dict.fromkeys(runs))})" if runs else ""
    return Text(name + seen_by, f"--data {data}", (Dataset(name, data),), notes=tuple(dict.fromkeys(notes)))


def held_out_text(domain: str, models: Sequence[ModelSource]) -> Text:
    """The documents that the first run among `models` held out: of one of its domains, or of `all`.

    Raises:
        UserError: no model belongs to a run, the run has no configuration, or it has no such domain.
    """
    run = next((model.run for model in models if model.run is not None), None)
    key = f"--held-out {domain}"
    if run is None:
        raise UserError(f"{key}: only a run has held-out text; give one with --checkpoint RUN, or write --data")
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{key}: {run} has no config.yaml, which says what it held out; write --data PREFIX")
    config = load_config(file)[0]
    if config.task != "pretrain":
        raise UserError(f"{key}: {run} was trained on conversations, which have no perplexity here; write --data")
    known = [entry.name for entry in config.data.mixture]
    if domain != "all" and domain not in known:
        raise UserError(f"{key}: {run} has no such domain; write one of {', '.join(known)}, or all")
    entries = [entry for entry in config.data.mixture if domain in ("all", entry.name)]
    missing = [entry.path for entry in entries if not Path(f"{entry.path}.idx").is_file()]
    if missing:
        raise UserError(
            f"{key}: the dataset {missing[0]} of {file} is not there; start this where the run was started, or write "
            "--data PREFIX"
        )
    datasets = tuple(Dataset(entry.name, entry.path, entry.weight) for entry in entries)
    name = f"held-out text of {run.name}" + (f" ({domain})" if domain != "all" else "")
    others = [str(model) for model in models if model.run != run]
    note = f"{key}: {run} held these documents out; it is not known whether {', '.join(others)} did" if others else ""
    return Text(name, key, datasets, config.data.split, "validation", (note,) if note else ())


def open_held_out(
    data: str, seq_length: int, samples: int, source: ModelSource, allow_other_tokenizer: bool = False
) -> PackedSamples:
    """`open_text` of a whole dataset."""
    return open_text(given_text(data), seq_length, samples, source, allow_other_tokenizer)


def open_text(
    text: Text, seq_length: int, samples: int, source: ModelSource, allow_other_tokenizer: bool = False
) -> PackedSamples:
    """The packed text, with at least `samples` sequences.

    Raises:
        UserError: no such dataset, too few tokens, ids that the model does not have, or another tokenizer.
    """
    vocabulary = source.architecture.vocab_size
    packed = PackedSamples(text.datasets, seq_length, SHUFFLE_SEED, text.split, text.part, vocabulary=vocabulary)
    total = sum(one.weight for one in text.datasets)
    shares = zip(packed.describe(samples), text.datasets, strict=True)
    held = min(int(share.tokens_per_epoch // seq_length * (total / one.weight)) for share, one in shares)
    if samples > held:
        fix = f"write --samples {held}" if held else "write a shorter --seq-length"
        raise UserError(f"--samples {samples}: {_label(text)} has only {held} samples of {seq_length} tokens; {fix}")
    if (packed.vocabulary_size or 0) > source.architecture.vocab_size:
        raise UserError(
            f"{text.key}: tokenized with a vocabulary of {packed.vocabulary_size}, but {source} has "
            f"{source.architecture.vocab_size}; preprocess it with the model's own tokenizer"
        )
    packed.refuse_foreign_ids(vocabulary)
    tokenizer_notes(packed, source, allow_other_tokenizer)
    return packed


def _label(text: Text) -> str:
    return text.datasets[0].path if text.part == "train" else f"the {text.name}"


def tokenizer_notes(packed: PackedSamples, source: ModelSource, allow_other_tokenizer: bool = False) -> list[str]:
    """Warnings if the tokenizer of data or model is not known, or if they differ and this is allowed.

    Raises:
        UserError: they differ, and this is not allowed.
    """
    made = [
        replace(one, name=f"--data {entry.path}") for one, entry in zip(packed.made_with(), packed.mixture, strict=True)
    ]
    return check_tokenizers(made, source.tokenizer, "--allow-other-tokenizer", allow_other_tokenizer)
