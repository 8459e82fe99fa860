"""`megalong data preprocess`: tokenizes a text corpus into indexed datasets, one for each JSON key.

    files → parts of 8 to 64 MB → workers: read, tokenize, write a finished part to disk → in order → the dataset

Tokens are not sent between processes, and memory does not grow with the corpus. A run that is killed and started again
keeps its finished parts (in `P.parts` until the end). The result does not depend on the number of workers or on
interruptions.

`--shard 3/16` does the third of 16 shares of the parts, for the tasks of a SLURM array. `megalong data merge` of all
shards, in order, gives byte for byte what one run would have written.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice

from megalong.data.corpus.decontaminate import ACTIONS, NGRAM, Benchmarks
from megalong.data.corpus.encoder import ENCODERS, BatchEncoder, reference
from megalong.data.corpus.grouping import bucket_count
from megalong.data.corpus.records import read_records
from megalong.data.corpus.run_parts import Run
from megalong.data.corpus.separator import POSITIONS, Separator, find_separator
from megalong.data.corpus.sources import LINES, TABLE, Part, Source, cut_into_parts, find_files, part_bytes
from megalong.data.corpus.tokenize_part import Reading, Tokenizing
from megalong.data.indexed import token_type
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.tokenizer import TextTokenizer
from megalong.data.workers import available_cores, in_background
from megalong.errors import UserError

WORKER_BYTES = 64 << 20  # of the corpus, after which a worker is replaced
SAMPLES = 8  # documents on which the encoders are compared before the run
ON_ERROR = ("fail", "skip")


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: str,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    separator: str | None = None,
    separator_position: str = POSITIONS[0],
    workers: int | None = None,
    on_error: str = ON_ERROR[0],
    group_by: str | None = None,
    group_path: str = "path",
    shard: str | None = None,
    decontaminate: Sequence[str] = (),
    decontaminate_action: str = ACTIONS[0],
    decontaminate_ngram: int = NGRAM,
    encoder: str = ENCODERS[0],
) -> list[str]:
    """Tokenize `inputs` into the datasets `{output_prefix}_{key}_document`, whose prefixes are returned.

    Args:
        inputs: files, folders or wildcards (see sources.py).
        output_prefix: where to write; missing folders are created.
        tokenizer: folder that contains a tokenizer.json.
        json_keys: keys whose values are documents, one dataset each.
        append_eod, separator, separator_position: the separator between documents (see separator.py).
        workers: processes that tokenize; None: one per core. The output does not depend on it.
        on_error: "fail" at the first bad record, or "skip" it into `{output_prefix}_rejected.jsonl`.
        group_by, group_path: keys of a record's group and of its path in the group (see grouping.py).
        shard: "i/n", from 1: do only this share, into `{output_prefix}_shard_i_of_n_{key}_document`.
        decontaminate, decontaminate_action, decontaminate_ngram: benchmark files, and what to do ("drop" or "report")
            with documents that share this many consecutive words with them (see decontaminate.py).
        encoder: "gigatoken" where it is exact, or only "tokenizers" (see encoder.py).

    Raises:
        UserError: a bad argument, an unreadable input (with file and line), an empty corpus, or a full disk. Existing
            datasets are then unchanged; finished parts are kept, and the message says so.
    """
    workers = available_cores() if workers is None else workers
    _check_arguments(json_keys, workers)
    place, shards = _shard(shard)
    files = find_files(inputs, lambda line: print(f"megalong: --input: {line}", file=sys.stderr))
    _check_keys_fit(files, [*json_keys, *([group_by, group_path] if group_by else [])])
    text_tokenizer = TextTokenizer(tokenizer)
    ending = find_separator(text_tokenizer, append_eod, separator, separator_position)
    benchmarks = Benchmarks(decontaminate, decontaminate_ngram) if decontaminate else None
    size = part_bytes(files)
    parts, turns = cut_into_parts(files, size), max(WORKER_BYTES // size, 1)
    group = (group_by, group_path) if group_by else None
    reading = Reading(list(json_keys), on_error == "skip", benchmarks, decontaminate_action == "drop", group)
    prefix = output_prefix if shard is None else f"{output_prefix}_shard_{place + 1:05d}_of_{shards:05d}"
    with (
        in_background(lambda one: one.ids, text_tokenizer) as ids,
        _encoder(text_tokenizer, encoder, parts, json_keys) as (batch_encoder, check),
    ):
        dtype = token_type(batch_encoder.vocabulary_size)
        run = Run(prefix, reading, Tokenizing(batch_encoder, ending, dtype, text_tokenizer.sha256), workers, turns)
        with run.kept_on_failure():
            run.tokenize(parts, place, shards, bucket_count(files) if group else None, check)
            if shard is None:
                run.refuse_empty(inputs)
            about = {
                "grouped_by": group_by,
                "tokenizer": text_tokenizer.described() | {"ids": ids()},
                "vocabulary_size": batch_encoder.vocabulary_size,
                "separator": ending.described() if ending else None,
            }
            writers = run.publish(about)
    for writer in writers:
        print(_summary(writer, ending, run.seconds))
    return [writer.prefix for writer in writers]


def _check_arguments(json_keys: Sequence[str], workers: int) -> None:
    if workers < 1:
        raise UserError(f"--workers: {workers} given; at least 1 process must tokenize")
    if not json_keys or len(set(json_keys)) != len(json_keys):
        raise UserError(f"--json-keys: {' '.join(json_keys) or 'nothing'} given; name each key once, at least one")


def _check_keys_fit(files: list[Source], keys: Sequence[str]) -> None:
    for file in files:
        if len(keys) > 1 and file.kind not in (LINES, TABLE):
            raise UserError(
                f"--json-keys, --group-by: {' '.join(keys)} given, but {file.path} is one text; give one key for it"
            )


def _shard(shard: str | None) -> tuple[int, int]:
    """`"3/16"` → (2, 16); None → (0, 1)."""
    place, _, shards = (shard or "1/1").partition("/")
    if not (place.isdecimal() and shards.isdecimal() and 1 <= int(place) <= int(shards)):
        raise UserError(f"--shard {shard}: shards are counted from 1; write 1/16 to 16/16 for sixteen")
    return int(place) - 1, int(shards)


@contextmanager
def _encoder(
    tokenizer: TextTokenizer, asked: str, parts: Sequence[Part], keys: Sequence[str]
) -> Iterator[tuple[BatchEncoder, Callable[[], None]]]:
    """The encoder, and a function that compares it with `tokenizers`, which run in another process meanwhile."""
    if asked != ENCODERS[0]:
        yield BatchEncoder(tokenizer, asked), lambda: None
        return
    with ExitStack() as stack:
        answer = stack.enter_context(in_background(lambda _: reference(tokenizer, _sample(parts, keys)), 0))
        batch_encoder = BatchEncoder(tokenizer, asked)
        if batch_encoder.fallback:
            print(
                f"megalong: gigatoken cannot load {tokenizer.name} ({batch_encoder.fallback}); "
                "tokenizing with `tokenizers`, about fifty times slower",
                file=sys.stderr,
            )

        def check() -> None:
            if batch_encoder.fallback is None:
                batch_encoder.compare(answer())
            stack.close()

        yield batch_encoder, check


def _sample(parts: Sequence[Part], keys: Sequence[str]) -> Iterator[str]:
    """The first good texts of evenly spaced parts of the corpus."""
    for number in range(0, len(parts), -(-len(parts) // SAMPLES)):
        for record in islice(read_records(parts[number], keys, lambda bad: None), 1):
            yield from record.texts


def _summary(writer: IndexedDatasetWriter, ending: Separator | None, seconds: float) -> str:
    place = f" ({ending.position} documents)" if ending else ""
    between = f"separator {ending.text!r} = {ending.ids}{place}" if ending else "no separator"
    return (
        f"{writer.prefix}: {writer.num_documents:,} documents ({writer.histogram.empty:,} empty), "
        f"{writer.num_tokens:,} tokens ({writer.dtype}), {between}, {seconds:.1f} s, "
        f"{writer.num_tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )
