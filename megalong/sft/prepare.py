"""Tokenizes conversations once, into a folder that every rank and every later start maps.

    DIR/sft-KEY/ids.bin      int32, all conversations end to end
    DIR/sft-KEY/targets.bin  bool, the tokens that are targets
    DIR/sft-KEY/ends.npy     int64, where each conversation ends
    DIR/sft-KEY/sources.npy  int32, the source of each conversation
    DIR/sft-KEY/report.json  what was read, kept and left out of each source, by reason, with examples
    DIR/sft-KEY/left_out.jsonl  every record that was left out, cut or not fully marked: source, place, reason, why

KEY is a digest of everything that the content depends on: files (size, modification time), tokenizer and template,
rules. The folder is written under another name and renamed, so it is never read half written. Tokens are written as
they are computed: memory contains digests (for duplicates) and lengths, but only a few chunks of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalong.config.sft import ConversationSource, Sft
from megalong.data.corpus.decontaminate import Benchmarks
from megalong.data.corpus.keys import Unread, listed
from megalong.data.corpus.sources import Source, find_files
from megalong.errors import UserError
from megalong.sft.mask import Tokens
from megalong.sft.reading import KEPT, Read, Reader, read_all
from megalong.sft.template import ChatTemplate

IDS, TARGETS, LEFT_OUT = "ids.bin", "targets.bin", "left_out.jsonl"
VERSION = 7  # of the folder's format and content
EXAMPLES = 20  # listed per reason
NOT_PREPARED = {"tokenizer", "max_length", "loss_average"}  # keys that are part of KEY in another way, or not at all


@dataclass(frozen=True)
class Prepared:
    """All usable conversations. Conversation i is ids[ends[i - 1] : ends[i]], from source `sources[i]`."""

    ids: np.ndarray
    targets: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    report: dict[str, Any]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [conversations]: tokens of each."""
        return np.diff(self.ends, prepend=0)


def prepare(sft: Sft, seq_length: int, tokenizer: str | Path, folder: Path) -> Prepared:
    """Tokenize the sources of `sft`, or map what an earlier call has left in `folder`.

    Raises:
        UserError: a source is missing or has no usable conversation, or a bad conversation's rule is `error`.
    """
    files = {source.name: _files(source) for source in sft.sources}
    if not (Path(tokenizer) / "tokenizer.json").is_file():
        raise UserError(
            f"sft.tokenizer: {tokenizer} contains no tokenizer.json; write sft.tokenizer: DIR, a folder that does"
        )
    template = ChatTemplate(tokenizer)
    limit = sft.max_length or seq_length
    benchmarks = _benchmarks(sft)
    what = (VERSION, limit, template.fingerprint, sft.model_dump_json(exclude=NOT_PREPARED), files)
    key = hashlib.sha256(repr((what, benchmarks.fingerprint if benchmarks else None)).encode()).hexdigest()[:32]
    place = folder / f"sft-{key}"
    if not place.is_dir():
        _make(sft, files, Reader(template, sft, limit, benchmarks), place)
    ids, targets = np.memmap(place / IDS, np.int32, "r"), np.memmap(place / TARGETS, bool, "r")
    ends, sources = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ("ends", "sources"))
    return Prepared(ids, targets, ends, sources, json.loads((place / "report.json").read_text()))


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report, a line for each source."""
    return [
        f"{name}: {one['kept']:,} conversations of {one['read']:,}, {one['tokens']:,} tokens, "
        f"{one['targets']:,} targets"
        + "".join(f"; {reason}: {count:,}" for reason, count in one["counts"].items())
        + (f"; unused keys: {listed(one['unread'])}" if one["unread"] else "")
        for name, one in report.items()
    ]


class _Writer:
    """Collects the conversations to keep: their tokens in files of the folder `aside`, everything else in memory."""

    def __init__(self, reader: Reader, aside: Path) -> None:
        self.report: dict[str, Any] = {}
        self._reader, self._rules, self._aside = reader, reader.rules, aside
        self._ids, self._targets = (aside / IDS).open("wb"), (aside / TARGETS).open("wb")
        self._left_out = (aside / LEFT_OUT).open("wb")
        self._seen: set[bytes] = set()
        self._lengths: list[int] = []
        self._sources: list[int] = []

    def read(self, source: ConversationSource, files: Sequence[Source]) -> None:
        """Read one source.

        Raises:
            UserError: a bad conversation's rule is `error`, or no conversation is usable.
        """
        counts: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        unread = Unread()
        before, read, targets = len(self._lengths), 0, 0
        with closing(read_all(self._reader, files, source)) as found:
            for one in found:
                read += 1
                unread.add(one.file, one.unread)
                reason, detail = self._verdict(source, one)
                if reason is not None:
                    counts[reason] += 1
                    entry = {"source": source.name, "place": one.place, "reason": reason, "detail": detail}
                    self._left_out.write(orjson.dumps(entry) + b"\n")
                    if len(examples.setdefault(reason, [])) < EXAMPLES:
                        examples[reason].append(f"{one.place}: {detail}")
                if one.tokens is not None and reason in KEPT:
                    self._keep(one.tokens)
                    targets += int(one.tokens.targets.sum())
                if source.max_samples is not None and len(self._lengths) - before == source.max_samples:
                    break
        kept = self._lengths[before:]
        if not kept:
            why = ", ".join(f"{reason}: {count}" for reason, count in counts.items()) or "it is empty"
            raise UserError(
                f"sft.sources: {source.name}: none of its {read} conversations can be used ({why}); the first: "
                f"{next(iter(examples.values()))[0] if examples else source.path}"
            )
        for line in unread.lines():
            _log(source.name, line)
        self._sources += [len(self.report)] * len(kept)
        self.report[source.name] = {
            "read": read,
            "kept": len(kept),
            "tokens": sum(kept),
            "targets": targets,
            "counts": dict(counts),
            "unread": unread.total,
            "examples": examples,
        }

    def _verdict(self, source: ConversationSource, one: Read) -> tuple[str | None, str]:
        """(reason, detail) of a record that is not kept, or not kept whole; (None, "") of a good one."""
        if one.tokens is None:
            if getattr(self._rules, f"on_{one.reason}") == "error":
                raise UserError(
                    f"sft.sources: {source.name}: {one.place}: {one.detail}; fix it, or write sft.on_{one.reason}: drop"
                )
            return one.reason, one.detail
        if self._rules.deduplicate:
            digest = hashlib.sha256(one.tokens.ids.tobytes() + one.tokens.targets.tobytes()).digest()
            if digest in self._seen:
                return "duplicate", "seen before"
            self._seen.add(digest)
        if one.contaminated is not None:
            return "contaminated", one.contaminated
        return one.reason, one.detail

    def _keep(self, tokens: Tokens) -> None:
        self._ids.write(tokens.ids.astype(np.int32).tobytes())
        self._targets.write(tokens.targets.tobytes())
        self._lengths.append(len(tokens.ids))

    def close(self) -> None:
        """Close the token files and write everything else."""
        self._ids.close()
        self._targets.close()
        self._left_out.close()
        np.save(self._aside / "ends.npy", np.cumsum(self._lengths, dtype=np.int64))
        np.save(self._aside / "sources.npy", np.array(self._sources, np.int32))
        (self._aside / "report.json").write_text(json.dumps(self.report, indent=2, ensure_ascii=False))


def _make(sft: Sft, files: dict[str, list[Source]], reader: Reader, place: Path) -> None:
    """Tokenize all sources and publish them as the folder `place`."""
    aside = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        writer = _Writer(reader, aside)
        for source in sft.sources:
            find_files([source.path], partial(_log, source.name))
            writer.read(source, files[source.name])
        writer.close()
        with suppress(OSError):  # another process was first
            aside.rename(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _log(name: str, line: str) -> None:
    print(f"megalong: sft.sources: {name}: {line}", file=sys.stderr)


def _benchmarks(sft: Sft) -> Benchmarks | None:
    try:
        return Benchmarks(sft.decontaminate, sft.decontaminate_ngram) if sft.decontaminate else None
    except UserError as error:
        raise UserError(str(error).replace("--input", "sft.decontaminate")) from None


def _files(source: ConversationSource) -> list[Source]:
    try:
        return find_files([source.path])
    except UserError as error:
        raise UserError(str(error).replace("--input", f"sft.sources: {source.name}")) from None
