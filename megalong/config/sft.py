"""`sft`: conversations to train on (`task: sft`), and what happens to unusable ones.

    sft:
      sources:
        - {name: general, path: chats.jsonl, weight: 0.7}
        - {name: code, path: code/, weight: 0.3, max_samples: 20000}
      max_length: 8192

Without weights, an epoch contains every conversation once. Weights are shares of tokens; an epoch then ends when the
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
    """One source of conversations."""

    name: DomainName
    """Name of the source. Example: `general`"""
    path: Text
    """JSONL or Parquet file, a folder of them, or a wildcard. Example: `chats.jsonl`"""
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion"] = "auto"
    """Format of the records; `auto` detects it from their keys."""
    weight: float | None = Field(default=None, gt=0)
    """Share of tokens; give one to all sources or to none. Example: `0.7`"""
    max_samples: Positive | None = None
    """Read at most this many usable conversations. Example: `20000`"""
    ignore_keys: tuple[Text, ...] = Field((), strict=False)
    """Keys of records and turns to ignore although they would change the text or the loss. Example: `[system]`"""


class Sft(Section):
    """Sources of conversations, and rules for bad ones."""

    sources: tuple[ConversationSource, ...] = Field((), strict=False)
    """Where conversations come from. Example: `[{name: general, path: chats.jsonl}]`"""
    tokenizer: Text | None = None
    """Folder with a chat template; default: the model's own. Example: `checkpoints/Meta-Llama-3-8B-Instruct`"""
    max_length: Positive | None = None
    """Tokens of a conversation; default and upper bound: `data.seq_length`. Example: `8192`"""
    loss_average: Literal["tokens", "conversations"] = "tokens"
    """Average the loss over all target tokens of the global batch, or over its conversations."""
    on_empty: Rule = "drop"
    """Reaction to a conversation without text."""
    on_no_assistant: Rule = "drop"
    """Reaction to a conversation without an answer."""
    on_unknown_role: Rule = "error"
    """Reaction to an unknown role."""
    on_malformed: Rule = "error"
    """Reaction to a record that the template cannot render."""
    on_too_long: Literal["drop", "truncate", "error"] = "drop"
    """Reaction to more than `max_length` tokens; `truncate` keeps the turns that fit, else the start of the first
    answer.
    """
    deduplicate: bool = True
    """Keep only the first of equal conversations."""
    decontaminate: tuple[Text, ...] = Field((), strict=False)
    """Benchmark files. Conversations are dropped if they share `decontaminate_ngram` consecutive words with one, or if
    a turn equals one of its shorter texts. Example: `[benchmarks/gsm8k.jsonl]`
    """
    decontaminate_ngram: Positive = 13
    """Consecutive words that count as shared."""

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
