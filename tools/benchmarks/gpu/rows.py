"""The rows of the benchmark, each with an estimate of its seconds, so that rows can be skipped to keep a budget."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megalong.config.architecture import Architecture
from megalong.costs.flops import flops_per_token

LENGTHS = {"256": 256, "8k": 1 << 13, "32k": 1 << 15, "128k": 1 << 17, "256k": 1 << 18, "512k": 1 << 19}
STEP_TOKENS = 1 << 15  # at least, per step: a step has several shorter sequences, one per micro-batch
LONG_STEP = 10.0  # seconds; longer steps have no warm-up, because the group's shorter ones were the warm-up
ROW_SECONDS, ATTENTION_SECONDS = 5.0, 1.0  # of repetitions
HEAD_DIM = 128
START_SECONDS = 20.0  # of a group's process: imports, weights, the first step
MATMUL = 790e12  # FLOP/s of an H100 or H200, for estimates before the measurement
# Model FLOPs over the matmul rate, for estimates only; activations are recomputed, which is not counted as work.
GUESSED_UTILISATION = {"ours": 0.40, "transformers": 0.30, "attention": 0.55}
ATTENTION = ("ours", "flash", "sdpa", "te", "te_fp8", "documents")

_LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "ffn_hidden_size": 14336, "num_layers": 4, "num_attention_heads": 32, "num_query_groups": 8,
    "kv_channels": 128, "vocab_size": 16032, "max_position_embeddings": 1 << 18, "rope": {"rope_theta": 5e5},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B.
    "1b": {
        **_LLAMA_8B, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_layers": 16, "kv_channels": 64,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    # An eighth of Llama 3.1 8B: 4 of 32 layers and 16,032 of 128,256 tokens of the vocabulary, so that layers and head
    # have the same shares of a step as in the whole model.
    "8b_eighth": _LLAMA_8B,
    "tiny": {
        **_LLAMA_8B, "hidden_size": 64, "ffn_hidden_size": 128, "num_layers": 2, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 16, "vocab_size": 500,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement: training steps of a `size` by a `side` in a `precision`, or attention by a `side`."""

    size: str
    length: str
    side: str
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """The name that `--rows` and `--skip` match."""
        return "/".join([self.size, self.length, self.side, *([] if self.is_attention else [self.precision])])

    @property
    def figure(self) -> str:
        """The prefix of its figures' names."""
        return f"{self.size}_{self.length}_{self.side}_{self.precision}"

    @property
    def is_attention(self) -> bool:
        return self.size == "attention"

    @property
    def group(self) -> str:
        """Rows of a group share a process, and a model if they train one."""
        return self.size if self.is_attention else f"{self.size}/{self.side}/{self.precision}"

    @property
    def tokens(self) -> int:
        """Tokens per sequence."""
        return LENGTHS[self.length]

    @property
    def sequences(self) -> int:
        """Sequences per step."""
        return 2 if self.size == "tiny" else max(1, STEP_TOKENS // self.tokens)

    @property
    def flops(self) -> float:
        """Model FLOPs of one repetition."""
        if self.is_attention:
            heads, _ = attention_heads(self.tokens)
            return attention_flops(self.tokens, heads)
        return self.sequences * self.tokens * flops_per_token(architecture(self.size), self.tokens)

    def once(self, matmul: float = MATMUL) -> float:
        """Estimated seconds of a repetition, from the chip's matmul rate in FLOP/s."""
        return self.flops / (matmul * GUESSED_UTILISATION["attention" if self.is_attention else self.side])

    def seconds(self, matmul: float = MATMUL) -> float:
        """Estimated seconds of all repetitions, the warm-up included."""
        once = self.once(matmul)
        if self.is_attention:
            return once + max(once, ATTENTION_SECONDS)
        return once if once > LONG_STEP else once + max(once, ROW_SECONDS)


def attention_heads(length: int) -> tuple[int, int]:
    """(query, key heads): those of Llama 3.1 8B, and from 256K tokens on those of one of its TP 8 ranks.

    If one head fills the chip, the rate does not depend on their number, and a repetition takes only seconds.
    """
    return (32, 8) if length < LENGTHS["256k"] else (4, 1)


def attention_flops(length: int, heads: int) -> float:
    """FLOPs of the causal half: 2 products forward and 5 backward, 2 FLOPs each, length² / 2 pairs."""
    return 3.5 * 2 * float(length) ** 2 * heads * HEAD_DIM


def architecture(size: str) -> Architecture:
    """The shape of a size."""
    return Architecture.model_validate(SIZES[size])


@dataclass(frozen=True)
class Choice:
    """The rows to measure; patterns are shell patterns of row names."""

    quick: bool = False
    rows: Sequence[str] = field(default_factory=lambda: ["*"])
    skip: Sequence[str] = ()
    tiny: bool = False


QUICK_SECONDS = 480.0
_NOT_QUICK = ("1b/256k/*", "attention/512k/*")


def chosen(choice: Choice) -> list[Row]:
    """Rows group by group, the shortest sequences of a group first."""
    left_out = [*choice.skip, *(_NOT_QUICK if choice.quick else ())]
    rows = _tiny() if choice.tiny else _all()
    return [
        row
        for row in rows
        if any(fnmatch.fnmatch(row.name, pattern) for pattern in choice.rows)
        and not any(fnmatch.fnmatch(row.name, pattern) for pattern in left_out)
    ]


def _all() -> list[Row]:
    sides = (("ours", "bf16"), ("transformers", "bf16"), ("ours", "fp8"))
    training = [
        Row(size, length, side, precision)
        for size in ("8b_eighth", "1b")
        for side, precision in sides
        for length in ("8k", "32k", "128k", "256k")
    ]
    return [*(Row("attention", length, side) for length in ("32k", "128k", "512k") for side in ATTENTION), *training]


def _tiny() -> list[Row]:
    sides = (("ours", "bf16"), ("transformers", "bf16"), ("ours", "fp8"))
    return [Row("attention", "256", "ours"), *(Row("tiny", "256", *side) for side in sides)]


def estimate(rows: Sequence[Row]) -> float:
    """Estimated seconds of all `rows`, with the start of their processes."""
    return START_SECONDS * len({row.group for row in rows}) + sum(row.seconds() for row in rows)
