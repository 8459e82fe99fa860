"""The corpus: real text that every machine with Python has.

    code      the standard library's sources, one document per file (about 10 MB, files of up to 230 KB)
    prose     the language reference of `pydoc_data.topics`, one document per topic (about 0.5 MB)
    heldout   every 15th document of both: never trained on, used to measure perplexity

Documents must be long: a sample of 4096 tokens is mostly one file, so far context helps to predict the next token.
Tests, caches, installed packages and the tables of `encodings` (numbers, not language) are left out.
"""

from __future__ import annotations

import importlib
import json
import random
import sysconfig
from pathlib import Path

from megalong.errors import UserError

HELD_OUT_EVERY = 15
DOMAINS = ("code", "prose", "heldout")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
_ENOUGH_CHARACTERS = 2_000_000


def library_sources() -> dict[str, str]:
    """The text of every source file of this Python's standard library by module, in the order of paths.

    Raises:
        UserError: this Python was installed without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT.intersection(path.relative_to(root).parts)]
    texts = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
            encoding="utf-8", errors="replace"
        )
        for path in files
    }
    if sum(map(len, texts.values())) < _ENOUGH_CHARACTERS:
        raise UserError(
            f"{root}: no sources of the standard library ({len(files)} files), which are the quickstart's corpus; run "
            "it with a Python that was installed with its .py files"
        )
    return {module: text for module, text in texts.items() if text.strip()}


def standard_library() -> list[str]:
    """The texts of `library_sources`."""
    return list(library_sources().values())


def language_reference() -> list[str]:
    """The topics of Python's built-in help, sorted by name.

    Raises:
        UserError: this Python was installed without them.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("pydoc_data.topics: not in this Python; install its full standard library") from None
    return [topics[name] for name in sorted(topics)]


def split_corpus(code: list[str], prose: list[str], seed: int = 1234) -> dict[str, list[str]]:
    """Shuffle both domains and hold out every 15th document of each: texts by the names of `DOMAINS`."""
    kept: dict[str, list[str]] = {"heldout": []}
    for name, texts in (("code", code), ("prose", prose)):
        shuffled = random.Random(seed).sample(texts, len(texts))
        kept["heldout"] += shuffled[::HELD_OUT_EVERY]
        kept[name] = [text for number, text in enumerate(shuffled) if number % HELD_OUT_EVERY]
    return kept


def write_corpus(folder: Path) -> None:
    """Write `folder/{code,prose,heldout}.jsonl` and print their sizes."""
    corpus = split_corpus(standard_library(), language_reference())
    for name in DOMAINS:
        lines = [json.dumps({"text": text}) + "\n" for text in corpus[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        characters = sum(map(len, corpus[name]))
        print(f"{name:8} {len(lines):4d} documents, {characters / 1e6:5.2f} million characters")


def training_texts(folder: Path) -> list[str]:
    """Every training document that `write_corpus` wrote."""
    texts = []
    for name in ("code", "prose"):
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts
