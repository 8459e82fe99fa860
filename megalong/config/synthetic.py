"""`synthetic:` of a domain in `data.mixture`: its samples are long documents, built on the fly from its dataset.

- {name: needles, path: books_text_document, weight: 0.1, synthetic: {task: multi_key, needles: 8}}
- {name: joined, path: code_text_document, weight: 0.3, synthetic: {task: related}}
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.architecture import Positive
from megalong.config.section import Section

READ_BY = {  # key: the tasks that read it
    "needles": ("multi_key",),
    "hops": ("variable_tracking",),
    "chains": ("variable_tracking",),
    "words": ("word_count",),
}
Some = Annotated[int, Field(ge=1, le=1000)]


class Synthetic(Section):
    """The synthetic documents of a domain; one per sample."""

    task: Literal["needle", "multi_key", "variable_tracking", "word_count", "related"]
    """`related` joins similar documents. `needle`, `multi_key`, `variable_tracking` and `word_count` hide facts in real
    text and end with a question. Example: `multi_key`
    """
    min_length: Positive | None = None
    """Shortest document in tokens; lengths are spread evenly up to the sample's. Default: all have the sample's length.
    Example: `65536`
    """
    needles: Some = 4
    """`multi_key`: number of facts."""
    hops: Some = 4
    """`variable_tracking`: assignments per chain."""
    chains: Some = 2
    """`variable_tracking`: number of chains."""
    words: Annotated[int, Field(ge=1, le=100)] = 3
    """`word_count`: number of words asked for."""
    loss: Literal["answer", "all"] | None = None
    """Train on the `answer` only (default for tasks with one) or on `all` tokens. Example: `all`"""
    tokenizer: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Tokenizer folder for the questions; default: the one the dataset was built with. Example:
    `checkpoints/Llama-3.1-8B-Instruct`
    """

    @property
    def answer_only(self) -> bool:
        """Whether the answer's tokens are the only targets."""
        return self.task != "related" and self.loss != "all"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for key, tasks in READ_BY.items():
            if key in self.model_fields_set and self.task not in tasks:
                raise ValueError(f"{key} is not read by task {self.task}: write task: {tasks[0]}, or leave {key} out")
        if self.task == "related":
            for key in ("min_length", "tokenizer"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is not read by task related, which adds no text: leave it out")
            if self.loss == "answer":
                raise ValueError("loss answer with task related, which has no answers: leave it out")
        return self
