"""`megalong data inspect CONFIG.yaml` for task sft: the report of the sources, and samples with their loss mask.

    sample 0: 128 tokens to read and one more, 4 documents, masked, 21 targets
      document 0: tokens 0 to 34, positions 0 to 34, 6 targets
      | ⟨<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎⟩Hello<|im_end|>⟨⏎⟩

Text between ⟨ and ⟩ is not trained on. Samples come from the code that training uses. What this command tokenizes is
stored in RUN/index, and the run reuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megalong.data.inspect_samples import describe
from megalong.data.tokenizer import TextTokenizer
from megalong.sft.samples import ConversationSamples


def conversation_blocks(samples: ConversationSamples, tokenizer: str | Path, count: int) -> Iterator[str]:
    """The report of the sources, and the first `count` samples as text."""
    yield "\n".join(str(line) for line in samples.describe(count))
    decoder, no_separator = TextTokenizer(tokenizer), {"ids": [], "text": ""}
    for k in range(count):
        yield describe(samples.read(k), f"sample {k}", True, decoder, no_separator)
