"""`megalong data inspect CONFIG.yaml`: training samples as text, with documents, positions and targets.

    sample 0 of books: 4,096 tokens to read and one more, 2 documents, masked, 4,095 targets
      document 0: tokens 0 to 17, positions 0 to 17, 17 targets
      | ⟨The⟩ rest of a document that began in another sample.⟦<s>⟧
      document 1: tokens 18 to 4,096, positions 0 to 4,077, 4,078 targets
      | ⟨Call⟩ me Ishmael. Some years ago⟦… 3,839 tokens …⟧and there is all his might before you.

Separators are between ⟦ and ⟧, tokens that are no targets (loss mask) between ⟨ and ⟩, and what was inserted into the
text (`synthetic`) between « and ». The last line explains the marks that were printed. Positions are those that the
model gets. Samples come from the code that training uses; no torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.data.inspect import HEAD, TAIL, decoder_for, legend, printable, shown
from megalong.data.samples.sample import Sample
from megalong.data.samples.sampler import PackedSamples
from megalong.data.tokenizer import TextTokenizer
from megalong.data.vocabulary import model_vocabulary

AROUND = 12  # tokens shown on either side of what was planted
RUNS = 3  # runs of positions shown per document


Blocks = Callable[[Config, int, str | None], Iterator[str]]


def inspect_samples(
    config: str,
    overrides: Sequence[str] = (),
    samples: int = 3,
    tokenizer: str | None = None,
    conversations: Blocks | None = None,
) -> None:
    """Print the first `samples` training samples of every stage.

    Args:
        tokenizer: folder to decode with. None: the one the datasets were made with, or IDs if that is gone.
        conversations: shows a stage of task sft. Passed in because `sft` is above this package.

    Raises:
        UserError: the configuration or a dataset is wrong, or the tokenizer is not the one it was made with.
    """
    stages, vocabulary, shown_blocks = load_config(config, list(overrides)), None, list[str]()
    for stage in stages:
        vocabulary = model_vocabulary(stage) or vocabulary  # a stage may continue with the model of the one before
        if len(stages) > 1:
            print(f"stage {stage.run.name}")
        if conversations is not None and stage.task == "sft":
            blocks = conversations(stage, samples, tokenizer)
        else:
            blocks = _blocks(stage, samples, tokenizer, vocabulary)
        for block in blocks:
            print(block + "\n")
            shown_blocks.append(block)
    print("\n".join(legend(shown_blocks)))


def _blocks(config: Config, count: int, tokenizer: str | None, vocabulary: int | None) -> Iterator[str]:
    packed = PackedSamples.of(config, vocabulary=vocabulary)
    if vocabulary is not None:
        packed.refuse_foreign_ids(vocabulary)
    streams = dict(zip(packed.names, packed.streams, strict=True))
    decoders = {name: decoder_for(stream.dataset, tokenizer) or stream.tokenizer for name, stream in streams.items()}
    for k in range(count):
        name = packed.domain_of(k)
        separator = (streams[name].dataset.sidecar or {}).get("separator") or {"ids": [], "text": ""}
        row = packed.row(k)
        yield describe(
            packed.read(k),
            f"sample {k} of {name}",
            config.data.masked,
            decoders[name],
            separator,
            row.planted,
            row.starts,
            row.paddings,
        )


def describe(
    sample: Sample,
    title: str,
    masked: bool,
    decoder: TextTokenizer | None,
    separator: dict[str, Any],
    planted: Sequence[tuple[int, int]] = (),
    documents: np.ndarray | None = None,
    paddings: Sequence[tuple[int, int]] | None = None,
) -> str:
    """One sample, document by document, as in the module's docstring.

    Args:
        planted: (first token, end) of each text that was inserted, ascending.
        documents: int64, ascending from 0: where documents (or the rest of one) and padding begin. None: where
            attention is masked.
        paddings: (first token, end) of padding, ascending. None: after `sample.filled`.
    """
    length = len(sample.tokens) - 1
    documents = sample.documents if documents is None else documents
    paddings = [(sample.filled, length + 1)] if paddings is None else paddings
    targets, positions = targets_of(sample, masked), positions_of(sample, masked)
    blocks, number = [], 0
    for first, end in pairwise(np.unique([*documents, *(one for span in paddings for one in span), length + 1])):
        if any(begin <= first < stop for begin, stop in paddings):
            blocks.append(f"  padding: tokens {first:,} to {end - 1:,}")
            continue
        marked = [(begin - first, stop - first) for begin, stop in planted if first <= begin and stop <= end]
        text = _text(sample.tokens[first:end].tolist(), targets[first:end], decoder, separator, marked)
        blocks += [
            f"  document {number}: tokens {first:,} to {end - 1:,}, "
            f"positions {_spans(positions[first:end])}, {int(targets[first:end].sum()):,} targets",
            *(f"  | {line}" for line in text.split("\n")),
        ]
        number += 1
    mask = _masking(sample, number, paddings, masked)
    head = (
        f"{title}: {length:,} tokens to read and one more, {number:,} documents{mask}, {int(targets.sum()):,} targets"
    )
    return "\n".join([head, *blocks])


def _masking(sample: Sample, documents: int, paddings: Sequence[tuple[int, int]], masked: bool) -> str:
    """How documents attend to each other; printed after their number."""
    packs = [start for start in sample.documents if not any(first <= start < end for first, end in paddings)]
    if not masked or len(packs) < min(2, documents):
        return " that see each other"
    return ", masked" if len(packs) == documents else f" in {len(packs):,} masked packs"


def targets_of(sample: Sample, masked: bool) -> np.ndarray:
    """bool [S + 1]: the tokens that are targets; the first never is."""
    targets = np.arange(len(sample.tokens)) < sample.filled
    targets[0] = False
    if masked:
        targets[sample.documents] = False
    return targets if sample.targets is None else targets & sample.targets


def positions_of(sample: Sample, masked: bool) -> np.ndarray:
    """int64 [S]: the position of each input token."""
    if sample.positions is not None:
        return sample.positions
    places = np.arange(len(sample.tokens) - 1)
    if not masked:
        return places
    return places - sample.documents[np.searchsorted(sample.documents, places, side="right") - 1]


def _spans(positions: np.ndarray) -> str:
    """`0 to 17`, or `0 to 9, 700 to 707` if positions were skipped."""
    if len(positions) == 0:
        return "none"
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    spans = [f"{run[0]:,} to {run[-1]:,}" for run in np.split(positions, cuts[:RUNS])[:RUNS]]
    return ", ".join([*spans, "…"] if len(cuts) >= RUNS else spans)


def _text(
    ids: list[int],
    targets: np.ndarray,
    decoder: TextTokenizer | None,
    separator: dict[str, Any],
    planted: Sequence[tuple[int, int]],
) -> str:
    """Head and tail of a document, and what was planted between them with its surroundings."""
    kept = np.ones(len(ids), bool)
    kept[HEAD : max(HEAD, len(ids) - TAIL)] = False
    for begin, end in planted:
        kept[max(0, begin - AROUND) : end + AROUND] = True
    cuts = {bound for span in planted for bound in span} | set((np.flatnonzero(np.diff(kept)) + 1).tolist())
    text = ""
    for begin, end in pairwise(sorted({0, len(ids), *cuts})):
        if not kept[begin]:
            text += f"⟦… {end - begin:,} tokens …⟧"
            continue
        part = _marked(ids[begin:end], targets[begin:end], decoder, separator)
        text += f"«{part}»" if any(first <= begin < last for first, last in planted) else part
    return text


def _marked(ids: list[int], targets: np.ndarray, decoder: TextTokenizer | None, separator: dict[str, Any]) -> str:
    """Text of `ids`, with marks around separators and around tokens that are no targets."""
    kind = np.where(targets, 0, 1)
    for place in _places(ids, separator["ids"]):
        kind[place : place + len(separator["ids"])] += 2
    parts = []
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(kind)) + 1):
        these = [ids[i] for i in run]
        text = shown(these, decoder)
        if kind[run[0]] >= 2:
            repeats = max(1, len(these) // len(separator["ids"]))
            text = f"⟦{printable(separator['text'])}⟧" * repeats if decoder else f"⟦{text}⟧"
        parts.append(f"⟨{text}⟩" if kind[run[0]] % 2 else text)
    return ("" if decoder else " ").join(parts)


def _places(ids: list[int], wanted: list[int]) -> list[int]:
    """Where `wanted` occurs in `ids`, without overlaps."""
    found, place = [], 0
    while wanted and place <= len(ids) - len(wanted):
        if ids[place : place + len(wanted)] == wanted:
            found.append(place)
            place += len(wanted)
        else:
            place += 1
    return found
