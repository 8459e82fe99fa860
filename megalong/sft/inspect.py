"""`megalong data inspect CONFIG.yaml` of a run on conversations: what is read, and samples with the mask over them.

    sample 0: 128 tokens to read and one more, 4 documents, masked, 21 targets
      document 0: tokens 0 to 34, positions 0 to 34, 6 targets
      | ⟨<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎⟩Hello<|im_end|>⟨⏎⟩

What stands between ⟨ and ⟩ is not learnt. The samples are those training reads, from the same code; what this tokenizes
is kept in RUN/index, and the run finds it there.
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
