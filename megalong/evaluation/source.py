"""What is measured and on what: models by their folders; text by a prefix, or by what a run held out. No torch here.

A text has a name, which tables and pictures show: whether a run was trained on it decides what its perplexity means.
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
Asked = tuple[Literal["checkpoint", "hf", "rope"], str]  # an option that names a model, or how to read its positions


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from; exactly one of `checkpoint` (a step's folder) and `hf` is set.

    Attributes:
        architecture: with the positions to measure under; its `torch_dtype` is the type to compute in.
        lora: what the checkpoint's adapters are, None where it has none.
        why: who says that type.
        rope: what was asked for instead of the model's own positions, in a few words; empty: nothing.
        trained_on: digests of the datasets of the run that wrote the checkpoint, by the name of their domain.
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
        """Where its tokenizer is, if it has one."""
        return self.checkpoint / ASSETS if self.checkpoint is not None else self.hf or Path()

    @property
    def run(self) -> Path | None:
        """The folder of the run that the checkpoint lies in."""
        folder = self.checkpoint.resolve() if self.checkpoint is not None else None
        return folder.parent.parent if folder is not None and folder.parent.name == FOLDER else None

    @property
    def name(self) -> str:
        """The run's name, or the folder's: what tables and pictures call this model."""
        return self.names[0]

    @property
    def names(self) -> list[str]:
        """What to call it, the shortest first; a longer one where that is another model's too."""
        folder = (self.run or self.checkpoint or self.hf or Path()).resolve()
        step = self.checkpoint.resolve().name if self.run is not None and self.checkpoint is not None else ""
        rope = f" ({self.rope})" if self.rope else ""
        short, far = folder.name, f"{folder.parent.name}/{folder.name}"
        at_step = f" step {int(step.removeprefix('step-'))}" if step else ""
        return [short + rope, short + at_step + rope, far + rope, far + at_step + rope, str(folder) + at_step + rope]


def told_apart(sources: Sequence[ModelSource]) -> list[str]:
    """A name for each model, no two the same; the same model twice is numbered."""
    for names in zip(*(source.names for source in sources), strict=True):
        if len(set(names)) == len(names):
            return list(names)
    long = [source.names[-1] for source in sources]
    return [f"{name} ({1 + long[:at].count(name)})" for at, name in enumerate(long)]


def find_models(asked: Sequence[Asked], dtype: str | None = None) -> list[ModelSource]:
    """The models of a command line, in order: `("rope", …)` is for the model before it, and before the first for all.

    Raises:
        UserError: no model, a folder that holds none, or a scaling that is none.
    """
    everywhere: str | None = None
    models: list[tuple[Asked, str | None]] = []
    for one in asked:
        if one[0] != "rope":
            models.append((one, None))
        elif models:
            models[-1] = models[-1][0], one[1]
        else:
            everywhere = one[1]
    if not models:
        raise UserError("give a model: --checkpoint CKPT_OR_RUN or --hf DIR, and as many more as are to be compared")
    found = []
    for (kind, path), own in models:
        source = find_model(**{kind: path}, dtype=dtype)
        text = own if own is not None else everywhere
        found.append(source if text is None else _under(source, text))
    return found


def _under(source: ModelSource, text: str) -> ModelSource:
    """The model under the positions that `--rope TEXT` says."""
    values = parse_yaml(text, "--rope")
    if not isinstance(values, dict):
        raise UserError(f"--rope {text}: not a section of settings; write such as --rope '{{type: yarn, factor: 4}}'")
    try:
        rope = RopeSettings.model_validate(values)
    except ValidationError as error:
        raise explain(error, RopeSettings, lambda key: "--rope") from None
    named = rope.type if rope.factor == 1 else f"{rope.type} × {rope.factor:g}"
    if rope.rope_theta is not None:
        named += f", base {rope.rope_theta:g}"
    return replace(source, architecture=source.architecture.with_rope(rope), rope=named)


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
class Dataset:
    """What `PackedSamples` asks of an entry of a mixture."""

    name: str
    path: str
    weight: float = 1.0
    lengths: None = None


@dataclass(frozen=True)
class Text:
    """What is read.

    Attributes:
        name: what tables and pictures call it.
        key: the option that named it.
        split, part: which documents of each dataset, as `PackedSamples` has it.
        notes: what is to be said of it.
    """

    name: str
    key: str
    datasets: tuple[Dataset, ...]
    split: str = "1,0"
    part: str = "train"
    notes: tuple[str, ...] = ()


def given_text(data: str, models: Iterable[ModelSource] = ()) -> Text:
    """A dataset, taken whole; which of `models` were trained on it becomes part of its name."""
    name, digest, notes, runs = Path(data).name, dataset_digest(data), [], []
    for model in models:
        for domain in [domain for domain, found in model.trained_on.items() if found == digest]:
            run = model.run or model.checkpoint
            runs.append(model.name)
            notes.append(
                f"--data {data}: {run} was trained on it (data.mixture: {domain}), so this is no held-out text; write "
                f"--held-out {domain} for the documents that it has not seen"
            )
    told = f" (training data of {', '.join(dict.fromkeys(runs))})" if runs else ""
    return Text(name + told, f"--data {data}", (Dataset(name, data),), notes=tuple(dict.fromkeys(notes)))


def held_out_text(domain: str, models: Sequence[ModelSource]) -> Text:
    """The documents that the first run among `models` held out: of one of its domains, or of `all`.

    Raises:
        UserError: none of them is a run's, the run does not say what it read, or has no such domain.
    """
    run = next((model.run for model in models if model.run is not None), None)
    key = f"--held-out {domain}"
    if run is None:
        raise UserError(f"{key}: what was held out is known of a run; give one with --checkpoint RUN, or write --data")
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{key}: {run} has no config.yaml, which says what it held out; write --data PREFIX")
    config = load_config(file)[0]
    if config.task != "pretrain":
        raise UserError(f"{key}: {run} learnt from conversations, which perplexity is not measured on; write --data")
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
    note = f"{key}: {run} held these documents out; nothing says whether {', '.join(others)} did" if others else ""
    return Text(name, key, datasets, config.data.split, "validation", (note,) if note else ())


def open_held_out(
    data: str, seq_length: int, samples: int, source: ModelSource, allow_other_tokenizer: bool = False
) -> PackedSamples:
    """`open_text` of a dataset taken whole."""
    return open_text(given_text(data), seq_length, samples, source, allow_other_tokenizer)


def open_text(
    text: Text, seq_length: int, samples: int, source: ModelSource, allow_other_tokenizer: bool = False
) -> PackedSamples:
    """The text packed, with at least `samples` sequences in it.

    Raises:
        UserError: no such dataset, too few tokens, ids the model does not have, or another tokenizer's.
    """
    vocabulary = source.architecture.vocab_size
    packed = PackedSamples(text.datasets, seq_length, SHUFFLE_SEED, text.split, text.part, vocabulary=vocabulary)
    total = sum(one.weight for one in text.datasets)
    shares = zip(packed.describe(samples), text.datasets, strict=True)
    held = min(int(share.tokens_per_epoch // seq_length * (total / one.weight)) for share, one in shares)
    if samples > held:
        mend = f"write --samples {held}" if held else "write a shorter --seq-length"
        raise UserError(f"--samples {samples}: {_read(text)} holds only {held} samples of {seq_length} tokens; {mend}")
    if (packed.vocabulary_size or 0) > source.architecture.vocab_size:
        raise UserError(
            f"{text.key}: tokenized with a vocabulary of {packed.vocabulary_size}, but {source} has "
            f"{source.architecture.vocab_size}; preprocess it with the model's own tokenizer"
        )
    packed.refuse_foreign_ids(vocabulary)
    tokenizer_notes(packed, source, allow_other_tokenizer)
    return packed


def _read(text: Text) -> str:
    return text.datasets[0].path if text.part == "train" else f"the {text.name}"


def tokenizer_notes(packed: PackedSamples, source: ModelSource, allow_other_tokenizer: bool = False) -> list[str]:
    """What is not known of the tokenizers of data and model, or was let through.

    Raises:
        UserError: they are others, and that is not allowed.
    """
    made = [
        replace(one, name=f"--data {entry.path}") for one, entry in zip(packed.made_with(), packed.mixture, strict=True)
    ]
    return check_tokenizers(made, source.tokenizer, "--allow-other-tokenizer", allow_other_tokenizer)
