"""What a run reads, by its task: packed documents of datasets, or packed conversations."""

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
        assets: folder with the model's tokenizer, which conversations are read with unless `sft.tokenizer` names one.
        index_folder: where orders and tokenized conversations are kept for other ranks and the next start.
        vocabulary: ids the model has; reading any other is refused.

    Raises:
        UserError: an unreadable dataset or source, an empty part, no tokenizer.
    """
    if config.task == "pretrain":
        return PackedSamples.of(config, part, index_folder, vocabulary)
    folder = config.sft.tokenizer or assets
    if folder is None:
        raise UserError("sft.tokenizer: the model to start from brings none; write sft.tokenizer: DIR")
    assert index_folder is not None
    return ConversationSamples.open(config, part, folder, index_folder)


def check_tokenizer(config: Config, samples: Samples, assets: Path | None) -> list[str]:
    """Hold the tokenizer of what is read against the model's, in `assets`; what is not known, or let through.

    A model with random weights has none that could be another.

    Raises:
        UserError: it is another, and `data.allow_other_tokenizer` does not let it through.
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
