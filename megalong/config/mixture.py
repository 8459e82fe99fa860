"""`data.mixture`: the datasets of a run, the share of tokens each one gets, and what their lengths decide.

    - {name: books, path: books_text_document, weight: 0.3, lengths: {below: 4096, keep: 0.1, above: 8192, repeat: 2}}
    - {name: code, path: code_text_document, weight: 0.7, lengths: {drop_below: 64, above: 65536, share: 0.6}}

Lengths are tokens as they stand in the dataset, a separator included.
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
    """How often an epoch holds a document of a certain length; one that no rule names comes once.

    `drop_below`, `drop_above`: shorter or longer ones never come. `below` with `keep`: of the tokens in documents
    shorter than `below` an epoch holds this share, other documents every epoch until each had its turn. `above` with
    `repeat`: longer ones come that often, 2.5 being twice or three times in turn; or with `share`: as often as makes
    them this share of the domain's tokens. `max_repeats`: a run that would show a document more often is refused.
    """

    drop_below: Positive | None = None
    drop_above: Positive | None = None
    below: Positive | None = None
    keep: float | None = Field(default=None, ge=0, lt=1)
    above: Positive | None = None
    repeat: float | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0, lt=1)
    max_repeats: Positive | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if all(value is None for value in (self.drop_below, self.drop_above, self.below, self.above, self.max_repeats)):
            raise ValueError(f"no rule in it: write for example {EXAMPLE}, or leave lengths out")
        if (self.below is None) != (self.keep is None):
            raise ValueError("below and keep belong together: write for example below: 4096, keep: 0.1")
        if (self.above is None) != (self.repeat is None and self.share is None):
            raise ValueError("above belongs with repeat or share: write for example above: 8192, repeat: 2")
        if self.repeat is not None and self.share is not None:
            raise ValueError("repeat and share both say how often documents above come: write one of them")
        self._refuse_empty_spans()
        return self

    def _refuse_empty_spans(self) -> None:
        names = ("drop_below", "below", "above", "drop_above")
        bounds = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for (low, first), (high, second) in pairwise(bounds):
            none_between = (low, high) in (("drop_below", "below"), ("above", "drop_above"))
            if first > second or (none_between and first == second):
                raise ValueError(
                    f"{low} {first} and {high} {second} leave no length between them: write lengths that rise from "
                    "drop_below over below and above to drop_above"
                )


class Domain(Section):
    """One dataset: `path` is the prefix of its .bin and .idx, `weight` its share of the tokens.

    `seq_length`: its samples are packs of that many tokens side by side, masked from each other, which fill the run's
    `data.seq_length`.
    """

    name: DomainName
    path: Annotated[str, StringConstraints(min_length=1)]
    weight: float = Field(gt=0)
    seq_length: Annotated[int, Field(ge=2)] | None = None
    lengths: Lengths | None = None
    synthetic: Synthetic | None = None


class Pose(Section):
    """Positions that skip ahead (PoSE): each sample is cut into `chunks` whose positions rise to `target_length`."""

    target_length: Positive
    chunks: Annotated[int, Field(ge=2, le=64)] = 2
