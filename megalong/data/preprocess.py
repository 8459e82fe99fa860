"""`megalong data preprocess`: a corpus of text becomes indexed datasets of tokens, one for each JSON key.

    files → chunks of about 1 MB → workers: decode, tokenize, end every document → in order → {prefix}_{key}_document

The separator stands between documents. It is stored as the last tokens of every document, so that it is there in
whatever order a sampler lays documents down:

    --separator "<s>"    a special or added token of the tokenizer, by its spelling: its one id
    --separator $'\\n\\n'  any other text: the ids of that text
    --append-eod         the tokenizer's end token: Megatron-LM's flag for the same place
    (none of them)       documents touch

An empty document stays an empty document without tokens and without separator, as Megatron-LM's own tool writes it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megalong.data.indexed import token_type
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.lengths import length_histogram
from megalong.data.progress import Progress
from megalong.data.sources import LINES, Chunk, find_files, read_chunks, texts_of
from megalong.data.tokenizer import TextTokenizer
from megalong.data.workers import available_cores, map_in_order
from megalong.errors import UserError

CHUNK_BYTES = 1 << 20  # large enough to make hand-over free, small enough to share work evenly

Tokens = tuple[np.ndarray, np.ndarray]  # documents end to end, length of each


@dataclass(frozen=True)
class Separator:
    """What ends every document: how the user names it, and its ids."""

    text: str
    ids: list[int]


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: str,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    separator: str | None = None,
    workers: int | None = None,
) -> list[str]:
    """Tokenize `inputs` into the datasets `{output_prefix}_{key}_document`, whose prefixes are returned.

    Args:
        inputs: files, folders or wildcards (see sources.py).
        output_prefix: where to; missing folders are made.
        tokenizer: folder that holds a tokenizer.json.
        json_keys: keys whose values are documents, one dataset each.
        append_eod: end every document with the tokenizer's end token.
        separator: end every document with this special token or text; not together with append_eod.
        workers: processes that tokenize; all cores unless told otherwise. The output does not depend on it.

    Raises:
        UserError: a bad argument, an unreadable input (with file and line), an empty corpus. Nothing is written then.
    """
    workers = available_cores() if workers is None else workers
    _check_arguments(json_keys, workers)
    files = find_files(inputs)
    _check_keys_fit(files, json_keys)
    text_tokenizer = TextTokenizer(tokenizer)
    ending = find_separator(text_tokenizer, append_eod, separator)
    task = _Tokenize(text_tokenizer, list(json_keys), ending.ids if ending else [])
    progress = Progress(sum(file.stat().st_size for file in files))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(f"{output_prefix}_{key}_document", task.dtype))
            for key in json_keys
        ]
        _write_all(writers, map_in_order(task, read_chunks(files, CHUNK_BYTES), workers), progress)
        _refuse_empty(writers, json_keys, inputs)
        for key, writer in zip(json_keys, writers, strict=True):
            writer.finish(_described(writer, key, text_tokenizer, ending))
            print(_summary(writer, ending, progress.seconds))
    return [writer.prefix for writer in writers]


def find_separator(tokenizer: TextTokenizer, append_eod: bool, separator: str | None) -> Separator | None:
    """What ends every document, from the two flags that say so; None for nothing.

    Raises:
        UserError: both flags, an empty separator, or no end token to append.
    """
    if append_eod and separator is not None:
        raise UserError(f"--append-eod and --separator {separator!r} both end a document; give one of them")
    if append_eod:
        if tokenizer.eos_id is None:
            raise UserError(
                f"--append-eod: {tokenizer.path} names no end token; name one with --separator, or set "
                "eos_token in its tokenizer_config.json"
            )
        return Separator(tokenizer.spelling(tokenizer.eos_id), [tokenizer.eos_id])
    if separator is None:
        return None
    added = tokenizer.added_id(separator)
    ids = tokenizer.encode(separator) if added is None else [added]
    if not ids:
        raise UserError(f"--separator: {separator!r} has no tokens; leave the flag out to have none")
    return Separator(separator, ids)


class _Tokenize:
    """What a worker does with a chunk: for each key, tokens of all its documents end to end and their lengths."""

    def __init__(self, tokenizer: TextTokenizer, keys: list[str], ending: list[int]) -> None:
        self.tokenizer, self.keys, self.ending = tokenizer, keys, ending
        self.dtype = token_type(tokenizer.vocabulary_size)

    def __call__(self, chunk: Chunk) -> list[Tokens]:
        texts = [texts_of(record, self.keys) for record in chunk.records]
        return [self._tokens([one[place] for one in texts]) for place in range(len(self.keys))]

    def _tokens(self, texts: list[str]) -> Tokens:
        documents = [ids + self.ending if ids else ids for ids in self.tokenizer.encode_batch(texts)]
        lengths = np.array([len(ids) for ids in documents], np.int64)
        return np.fromiter(chain.from_iterable(documents), self.dtype, int(lengths.sum())), lengths


def _check_arguments(json_keys: Sequence[str], workers: int) -> None:
    if workers < 1:
        raise UserError(f"--workers: {workers} given; at least 1 process must tokenize")
    if not json_keys or len(set(json_keys)) != len(json_keys):
        raise UserError(f"--json-keys: {' '.join(json_keys) or 'nothing'} given; name each key once, at least one")


def _check_keys_fit(files: list[Path], json_keys: Sequence[str]) -> None:
    for file in files:
        if len(json_keys) > 1 and Path(file.name.lower().removesuffix(".gz")).suffix not in LINES:
            raise UserError(f"--json-keys: {' '.join(json_keys)} given, but {file} is one text; give one key for it")


def _write_all(writers: list[IndexedDatasetWriter], results: Any, progress: Progress) -> None:
    try:
        for chunk, tokens_by_key in results:
            for writer, (tokens, lengths) in zip(writers, tokens_by_key, strict=True):
                writer.add_documents(tokens, lengths)
            progress.update(chunk.position, writers[0].num_documents)
    finally:
        results.close()
        progress.finish()


def _refuse_empty(writers: list[IndexedDatasetWriter], json_keys: Sequence[str], inputs: Sequence[str]) -> None:
    for key, writer in zip(json_keys, writers, strict=True):
        if writer.num_tokens == 0:
            found = f"{writer.num_documents:,} documents, all empty" if writer.num_documents else "no document"
            raise UserError(f"--input: empty corpus: {found} under {key!r} in {' '.join(inputs)}; give files with text")


def _described(
    writer: IndexedDatasetWriter, key: str, tokenizer: TextTokenizer, ending: Separator | None
) -> dict[str, Any]:
    return {
        "key": key,
        "empty_documents": writer.num_documents - len(writer.lengths),
        "tokenizer": {"name": tokenizer.name, "path": tokenizer.path, "sha256": tokenizer.sha256},
        "vocabulary_size": tokenizer.vocabulary_size,
        "separator": {"text": ending.text, "ids": ending.ids} if ending else None,
        "length_histogram": length_histogram(np.frombuffer(writer.lengths, np.int32)),
    }


def _summary(writer: IndexedDatasetWriter, ending: Separator | None, seconds: float) -> str:
    between = f"separator {ending.text!r} = {ending.ids}" if ending else "no separator"
    return (
        f"{writer.prefix}: {writer.num_documents:,} documents ({writer.num_documents - len(writer.lengths):,} empty), "
        f"{writer.num_tokens:,} tokens ({writer.dtype}), {between}, {seconds:.1f} s, "
        f"{writer.num_tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )
