"""`sft`: conversations to train on (`task: sft`), and what becomes of those that cannot be used.

    sft:
      sources:
        - {name: general, path: chats.jsonl, weight: 0.7}
        - {name: code, path: code/, weight: 0.3, max_samples: 20000}
      max_length: 8192

Without weights every conversation comes once an epoch; weights are shares of tokens, and then an epoch ends where the
scarcest source has been seen once.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.architecture import Positive
from megalong.config.mixture import DomainName
from megalong.config.section import Section

Text = Annotated[str, StringConstraints(min_length=1)]
Rule = Literal["drop", "error"]


class ConversationSource(Section):
    """Conversations of a JSONL or Parquet file, a folder of them or a wildcard; the first `max_samples` good ones."""

    name: DomainName
    path: Text
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion"] = "auto"
    weight: float | None = Field(default=None, gt=0)
    max_samples: Positive | None = None


class Sft(Section):
    """Sources of conversations, and rules for bad ones.

    `tokenizer`: a folder with a chat template; without it the model's own. `max_length`: tokens of a conversation, at
    most `data.seq_length`, which is the default. `on_…`: what becomes of a conversation without any text (`empty`),
    without an answer, with a role nobody knows, of more than `max_length` tokens (`truncate` keeps the turns that fit,
    else the start of the first answer), and of one that no template can take. `deduplicate` keeps the first of equal
    ones; `decontaminate` drops those that share `decontaminate_ngram` words in a row with a benchmark file, and those
    with a turn that is one of its shorter texts word for word. `loss_average`: over all learnt tokens of the global
    batch, or over its conversations, each of which then weighs the same whatever its length.
    """

    sources: tuple[ConversationSource, ...] = Field((), strict=False)
    tokenizer: Text | None = None
    max_length: Positive | None = None
    loss_average: Literal["tokens", "conversations"] = "tokens"
    on_empty: Rule = "drop"
    on_no_assistant: Rule = "drop"
    on_unknown_role: Rule = "error"
    on_malformed: Rule = "error"
    on_too_long: Literal["drop", "truncate", "error"] = "drop"
    deduplicate: bool = True
    decontaminate: tuple[Text, ...] = Field((), strict=False)
    decontaminate_ngram: Positive = 13

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources name {name} twice: every source needs a name of its own")
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(names):
            raise ValueError(f"only {', '.join(weighted)} of the sources have a weight: give one to all or to none")
        return self
