"""`synthetic:` of a domain in `data.mixture`: its samples are long documents made up on the fly from its dataset.

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
    """What each document of the domain is, one a sample.

    `task`: `related` joins documents that resemble each other up to the length of a sample. The others take real text
    as a haystack and end with a question and its answer: `needle` hides a note; `multi_key` as many as `needles`, one
    of which is asked for; `variable_tracking` as many `chains` of `hops` copies of a value, asking where one value went
    to; `word_count` asks for the `words` most frequent words. `min_length`: documents have that many tokens up to
    `data.seq_length`, evenly spread; left out, all of them have `data.seq_length`. `loss`: on the answer alone, or on
    all tokens. `tokenizer`: the folder to write questions with; left out, the one the dataset was made with.
    """

    task: Literal["needle", "multi_key", "variable_tracking", "word_count", "related"]
    min_length: Positive | None = None
    needles: Some = 4
    hops: Some = 4
    chains: Some = 2
    words: Annotated[int, Field(ge=1, le=100)] = 3
    loss: Literal["answer", "all"] | None = None
    tokenizer: Annotated[str, StringConstraints(min_length=1)] | None = None

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
