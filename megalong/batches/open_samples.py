"""Open a run's samples by its task: packed documents of datasets, or packed conversations."""

from __future__ import annotations

from pathlib import Path

from megalong.config.schema import Config
from megalong.data.samples.sampler import PackedSamples
from megalong.data.tokenizer import TextTokenizer
from megalong.data.tokenizer_check import ALLOW, DatasetTokenizer, check_tokenizers
from megalong.errors import UserError
from megalong.sft.samples import ConversationSamples

Samples = PackedSamples | ConversationSamples


def open_samples(
    config: Config, part: str, assets: Path | None, index_folder: Path | None, vocabulary: int | None = None
) -> Samples:
    """Samples of "train" or "validation".

    Args:
        assets: folder with the model's tokenizer, which tokenizes conversations unless `sft.tokenizer` is set.
        index_folder: stores orders and tokenized conversations for other ranks and the next start.
        vocabulary: number of the model's token ids; any other id is refused.

    Raises:
        UserError: an unreadable dataset or source, an empty part, no tokenizer.
    """
    if config.task == "pretrain":
        return PackedSamples.of(config, part, index_folder, vocabulary)
    folder = config.sft.tokenizer or assets
    if folder is None:
        raise UserError("sft.tokenizer: the model to start from has no tokenizer; write sft.tokenizer: DIR")
    assert index_folder is not None
    return ConversationSamples.open(config, part, folder, index_folder)


def check_tokenizer(config: Config, samples: Samples, assets: Path | None) -> list[str]:
    """Compare the data's tokenizer with the model's, in `assets`; return lines on what is unknown or permitted.

    A model with random weights has no tokenizer that could differ.

    Raises:
        UserError: they differ, and `data.allow_other_tokenizer` does not permit it.
    """
    if config.model.load is None:
        return []
    if isinstance(samples, PackedSamples):
        made = samples.made_with()
    elif config.sft.tokenizer is None:
        return []  # the model's own
    else:
        made = [DatasetTokenizer("sft", TextTokenizer(config.sft.tokenizer).described())]
    return check_tokenizers(made, assets, ALLOW, config.data.allow_other_tokenizer)
