"""`data.mixture`: the datasets of a run, the share of tokens of each, and rules by document length.

    - {name: books, path: books_text_document, weight: 0.3, lengths: {below: 4096, keep: 0.1, above: 8192, repeat: 2}}
    - {name: code, path: code_text_document, weight: 0.7, lengths: {drop_below: 64, above: 65536, share: 0.6}}

Lengths are in tokens of the dataset, separators included.
"""

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.architecture import Positive
from megalong.config.section import Section
from megalong.config.synthetic import Synthetic

DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
EXAMPLE = "{below: 4096, keep: 0.1, above: 8192, repeat: 2}"


class Lengths(Section):
    """How often an epoch contains a document of a certain length (in tokens); once if no rule applies."""

    drop_below: Positive | None = None
    """Leave out shorter documents. Example: `64`"""
    drop_above: Positive | None = None
    """Leave out longer documents. Example: `1048576`"""
    below: Positive | None = None
    """Documents shorter than this are down-sampled to `keep`. Example: `4096`"""
    keep: float | None = Field(default=None, ge=0, lt=1)
    """Share of the tokens in documents under `below` that an epoch contains; a different share each epoch. Example:
    `0.1`
    """
    above: Positive | None = None
    """Documents longer than this are up-sampled by `repeat` or `share`. Example: `8192`"""
    repeat: float | None = Field(default=None, gt=0)
    """Times that documents over `above` occur per epoch; 2.5 alternates between 2 and 3. Example: `2`"""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the domain's tokens that documents over `above` make up, instead of `repeat`. Example: `0.6`"""
    max_repeats: Positive | None = None
    """Refuse a run that would show a document more often. Example: `4`"""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if all(value is None for value in (self.drop_below, self.drop_above, self.below, self.above, self.max_repeats)):
            raise ValueError(f"contains no rule: write for example {EXAMPLE}, or leave lengths out")
        if (self.below is None) != (self.keep is None):
            raise ValueError("below and keep belong together: write for example below: 4096, keep: 0.1")
        if (self.above is None) != (self.repeat is None and self.share is None):
            raise ValueError("above belongs with repeat or share: write for example above: 8192, repeat: 2")
        if self.repeat is not None and self.share is not None:
            raise ValueError("repeat and share both set how often documents over `above` occur: write one of them")
        self._refuse_empty_spans()
        return self

    def _refuse_empty_spans(self) -> None:
        names = ("drop_below", "below", "above", "drop_above")
        bounds = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for (low, first), (high, second) in pairwise(bounds):
            none_between = (low, high) in (("drop_below", "below"), ("above", "drop_above"))
            if first > second or (none_between and first == second):
                raise ValueError(
                    f"{low} {first} and {high} {second} leave no length between them: write rising lengths in the "
                    "order drop_below, below, above, drop_above"
                )


class Domain(Section):
    """One dataset of the mixture."""

    name: DomainName
    """Name of the domain. Example: `books`"""
    path: Annotated[str, StringConstraints(min_length=1)]
    """Prefix of the dataset's .bin and .idx. Example: `data/books_text_document`"""
    weight: float = Field(gt=0)
    """Share of the run's tokens, relative to the other weights. Example: `0.4`"""
    seq_length: Annotated[int, Field(ge=2)] | None = None
    """Fill each sample with packs of this many tokens, masked from each other; divides `data.seq_length`. Example:
    `65536`
    """
    lengths: Lengths | None = None
    """Rules by document length. Example: `{below: 4096, keep: 0.1, above: 8192, repeat: 2}`"""
    synthetic: Synthetic | None = None
    """Build long documents from this dataset. Example: `{task: related}`"""


class Pose(Section):
    """PoSE: each sample is split into chunks whose positions skip ahead."""

    target_length: Positive
    """Positions stay below this. Example: `4194304`"""
    chunks: Annotated[int, Field(ge=2, le=64)] = 2
    """Chunks per sample."""
