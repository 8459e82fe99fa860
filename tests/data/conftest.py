"""A small byte-level BPE tokenizer and a corpus, both from the standard library's own text."""

import json
import pydoc_data.topics
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PROSE = list(pydoc_data.topics.topics.values())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 tokens, `<s>` put before every text by its post-processor, truncation to 16 tokens switched on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE[:20], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(16)
    folder = tmp_path_factory.mktemp("tokenizers") / "small"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents of prose, some of them empty, as JSON lines."""
    path = tmp_path / "corpus.jsonl"
    texts = [text if number % 7 else "" for number, text in enumerate(PROSE[:40])]
    path.write_text("".join(json.dumps({"text": text, "title": text[:30] + "."}) + "\n" for text in texts))
    return path
