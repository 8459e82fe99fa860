"""`data`: what a run reads, how documents become samples, and how samples are loaded."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.architecture import Positive
from megalong.config.mixture import Domain, Pose
from megalong.config.section import Section
from megalong.config.split import split_weights

Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Data(Section):
    """What is read, how documents become samples, and how samples are loaded."""

    seq_length: Positive
    """Tokens per sample. Example: `1048576`"""
    packing: Literal["naive", "masked", "best_fit", "whole"] = "naive"
    """`naive`: documents end to end, attention across them. `masked`: the same, without attention across documents.
    `best_fit`: masked, cuts only documents that are longer than a sample, pads samples. `whole`: as `best_fit`, but
    leaves longer documents out.
    """
    separator: Text | None = None
    """The separator that the datasets must have been built with. Example: `"<s>"`"""
    mixture: tuple[Domain, ...] = Field((), min_length=1, strict=False, validate_default=False)
    """Datasets and their shares of the tokens. Example: `[{name: books, path: data/books_text_document, weight: 1.0}]`
    """
    split: Text = "99,1"
    """Shares of documents for training and validation."""
    allow_change: bool = False
    """Allow a resume with other data than the checkpoint was trained on; the change is logged."""
    allow_other_tokenizer: bool = False
    """Allow datasets built with a tokenizer whose ids differ from the model's; this is logged."""
    pose: Pose | None = None
    """PoSE: positions of training samples skip ahead. Example: `{target_length: 4194304, chunks: 2}`"""
    loader: Literal["torch", "dali"] = "torch"
    """`torch`: threads of the rank's process. `dali`: NVIDIA DALI's processes. Both give the same batches in the same
    order.
    """
    prefetch: Count = 2
    """Steps loaded ahead; 0 loads each step when it is needed."""
    workers: Positive = 1
    """Threads or processes per rank."""

    @property
    def split_weights(self) -> tuple[float, float]:
        """Weights of training and validation."""
        return split_weights(self.split)

    @property
    def masked(self) -> bool:
        """Whether documents, or the packs of a sample, are masked from each other."""
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
                f"pose.chunks {self.pose.chunks} is above data.seq_length {self.seq_length}, and every chunk needs a "
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
    """The largest divisor of `total` up to `wanted`; if that is 1, `total` itself."""
    found = next(divisor for divisor in range(min(wanted, total), 0, -1) if total % divisor == 0)
    return found if found > 1 else total
