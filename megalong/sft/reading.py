"""Files to tokenized conversations, on all cores of this process. The result does not depend on their number.

    files ─ records.py ─▶ chunks of records ─ a worker each ─▶ Read, Read, … ─ in the order of the files ─▶ prepare.py

Workers decide what depends only on one conversation: format, template, mask, length, benchmarks. The caller gets their
results in order and decides what depends on earlier ones (duplicates, `max_samples`) and whether the run ends. Small
files are read in this process, because starting another would take longer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalong.config.sft import ConversationSource, Sft
from megalong.data.corpus.decontaminate import Benchmarks
from megalong.data.corpus.keys import printable
from megalong.data.corpus.sources import Source
from megalong.data.progress import Progress
from megalong.data.workers import available_cores, map_in_order
from megalong.errors import UserError
from megalong.sft.formats import BadSampleError, Conversation, read_conversation
from megalong.sft.mask import Tokens, shorten, tokenize
from megalong.sft.records import Unreadable, records
from megalong.sft.template import ChatTemplate
from megalong.sft.written import unwritten

CHUNK = 128  # conversations sent to a worker at a time
BYTES_PER_WORKER = 1 << 20
KEPT = (None, "truncated", "unmarked")  # reasons of conversations that are trained on


@dataclass(frozen=True)
class Read:
    """One record: `tokens`, or why it has no tokens.

    Attributes:
        file: the record's file.
        place: file and line or row.
        reason: of a bad record, the rule that applies; "truncated" if it was cut; "unmarked" if the template does not
            mark an answer; None if it is good.
        detail: what is wrong with it.
        contaminated: the benchmark and its words that were found.
        unread: its unused keys.
    """

    file: str
    place: str
    reason: str | None
    detail: str
    tokens: Tokens | None
    contaminated: str | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Reads the records of all sources, with one template and one set of rules."""

    template: ChatTemplate
    rules: Sft
    limit: int
    benchmarks: Benchmarks | None

    def read(self, file: str, place: str, record: Any, source: ConversationSource) -> Read:
        """Tokenize one record. Does not raise for a bad one."""
        reason, detail = None, ""
        try:
            if isinstance(record, Unreadable):
                raise BadSampleError("malformed", record.why)
            conversation = read_conversation(record, source.format, source.ignore_keys)
            given = self.template.with_calls(conversation)
            unread = unwritten(self.template.text, given.messages, given.tools)
            tokens = tokenize(self.template, conversation)
            if tokens.unmarked:
                reason, detail = "unmarked", tokens.unmarked
            if len(tokens.ids) > self.limit:
                detail = f"{len(tokens.ids)} tokens, above the limit of {self.limit}"
                if self.rules.on_too_long != "truncate":
                    raise BadSampleError("too_long", detail)
                tokens, reason = shorten(self.template, conversation, self.limit), "truncated"
        except BadSampleError as error:
            return Read(file, place, error.reason, printable(str(error)), None)
        except RecursionError:
            return Read(file, place, "malformed", "nested too deeply", None)
        unused = tuple(printable(key) for key in sorted({*conversation.unread, *unread}))
        return Read(file, place, reason, detail, tokens, self._benchmark(conversation), unused)

    def _benchmark(self, conversation: Conversation) -> str | None:
        if self.benchmarks is None:
            return None
        texts = [message.get("content", "") for message in conversation.messages]
        hit = self.benchmarks.find(texts) or self.benchmarks.find_whole(texts)
        return None if hit is None else f"{hit.benchmark}: {hit.words}"


def read_all(
    reader: Reader, files: Sequence[Source], source: ConversationSource, cores: int | None = None
) -> Generator[Read, None, None]:
    """Every record of `files`, in order; prints progress.

    Args:
        cores: maximum number of processes; None: one per core.

    Raises:
        UserError: a file is broken, or a worker was killed.
    """
    size = sum(file.size for file in files)
    workers = min(cores or available_cores(), size // BYTES_PER_WORKER)
    progress, done = Progress(size, what="conversations"), 0

    def task(chunk: _Chunk) -> list[Read]:
        return [reader.read(file, place, record, source) for file, place, record in chunk.records]

    chunks = _chunks(files)
    try:
        for chunk, found in map_in_order(task, chunks, workers) if workers > 1 else _here(task, chunks):
            done += len(found)
            progress.update(chunk.position, done)
            yield from found
    except UserError as error:
        raise UserError(str(error).replace(f"--workers {workers}", "sft.sources")) from None
    finally:
        progress.finish()


@dataclass(frozen=True)
class _Chunk:
    """(file, place, record) of each record, and the bytes of all files read so far.

    Compressed files count when they end.
    """

    records: list[tuple[str, str, Any]]
    position: int


def _here(task: Any, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, list[Read]]]:
    for chunk in chunks:
        yield chunk, task(chunk)


def _chunks(files: Sequence[Source]) -> Iterator[_Chunk]:
    before, pending = 0, []
    for file in files:
        for place, record, share in records(file):
            pending.append((file.path, place, record))
            if len(pending) == CHUNK:
                yield _Chunk(pending, before + round(share * file.size))
                pending = []
        before += file.size
    if pending:
        yield _Chunk(pending, before)
