"""Samples that are tasks: real text of the dataset with something planted in it, then a question and its answer.

    sample j → its length T → text of piece j of the dataset's stream, as much as leaves room for the rest
             → notes planted at random depths → [text … note … text, question, answer, separator, padding]

Each sample is one document of T tokens, with T evenly spread over `min_length` … S. Every SPREAD samples have the same
lengths in another order, so shares of tokens are exact and known without making a sample. Separators inside the
haystack become line breaks. Sample j follows from (seed, domain, part, j) alone.

The text is from the dataset's own stream, so length rules and held-out documents work as for any domain.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from megalong.data.samples.piece import Piece, Span
from megalong.data.samples.sample import StoredTokens
from megalong.data.samples.stream import DomainStream
from megalong.data.synthetic.planting import Planter
from megalong.data.synthetic.tasks import Task, TaskSettings, draw_task
from megalong.data.synthetic.vocabulary import find_tokenizer
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError

SPREAD = 1000
TOKENS_OF_A_WORD = 6  # reserved per word of an answer, so that words of a text rarely have to be counted twice
TRIAL_TASKS = 16  # tasks that are drawn beforehand to estimate their size


class Built(NamedTuple):
    """A sample's document in the dataset's token type, the span of its answer, and the spans to mark when shown."""

    tokens: np.ndarray
    answer: Span
    planted: list[Span]


class TaskDocuments(DomainStream):
    """A domain whose samples are tasks in its text. Methods are those of its base.

    Args:
        settings: `synthetic` of the domain.
        arguments, named: those of the base.

    Raises:
        UserError: as the base, or the tokenizer is missing or a different one, or tasks do not fit.
    """

    def __init__(self, settings: TaskSettings, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._settings = settings
        self.name = self._where.rpartition("/")[0]
        self.tokenizer: TextTokenizer = find_tokenizer(self.dataset, settings.tokenizer, self.name)
        self._planter = Planter(self.tokenizer)
        self._lengths = lru_cache(maxsize=2)(self._lengths_of)
        self._refuse_too_short()

    @property
    def made_with(self) -> dict[str, str] | None:
        """Name, folder and fingerprint of the tokenizer."""
        return super().made_with or self.tokenizer.described()

    @property
    def vocabulary_size(self) -> int:
        """Highest ID + 1."""
        return super().vocabulary_size or self.tokenizer.vocabulary_size

    def piece(self, j: int) -> Piece:
        """Sample j of this domain."""
        return _TaskPiece(self, j)

    def tokens_of_pieces(self, pieces: int) -> int:
        """Tokens of documents in the first `pieces` samples."""
        blocks, rest = divmod(pieces, SPREAD)
        return blocks * int(self._lengths(0).sum()) + int(self._lengths(blocks)[:rest].sum())

    def lengths_by_class(self) -> list[tuple[np.ndarray, float]]:
        """Tokens of the tasks, and how often each occurs in as many tokens as an epoch of the haystack has."""
        lengths = self._lengths(0)
        return [(lengths, self.tokens_per_epoch / int(lengths.sum()))]

    def _random(self, number: int, purpose: int) -> np.random.RandomState:
        """A generator with a seed of eight numbers; those of the base have fewer."""
        numbers = [number & 0xFFFFFFFF, number >> 32, self.seq_length & 0xFFFFFFFF, purpose, 0]
        return np.random.RandomState([*self._seed, *numbers])

    def length_of(self, j: int) -> int:
        """Tokens of sample j's document, at most S."""
        block, place = divmod(j, SPREAD)
        return int(self._lengths(block)[place])

    def _lengths_of(self, block: int) -> np.ndarray:
        """int64 [SPREAD]: tokens of each document in one block of samples."""
        shortest = self._shortest
        steps = 2 * self._random(block, 0).permutation(SPREAD) + 1
        return shortest + steps * (self.seq_length - shortest + 1) // (2 * SPREAD)

    def build(self, j: int) -> Built:
        """Build sample j's document."""
        random = self._random(j, 1)
        task = draw_task(self._settings, random)
        depths = np.sort(random.random_sample(len(task.planted))).tolist()
        before, after = self._separators
        notes = [self.tokenizer.encode(f"\n{sentence}\n") for sentence in task.planted]
        question = self.tokenizer.encode(f"\n\n{task.question}\nAnswer:")
        room = self.length_of(j) - len(before) - len(question) - len(after) - sum(map(len, notes))
        text, answer = self._text_and_answer(task, self.place_of(j) * self.seq_length, room)
        text, spans = self._planter.plant(text, notes, depths)
        first = len(before) + len(text) + len(question)
        tokens = np.concatenate([np.array(before, np.int64), text, np.array([*question, *answer, *after], np.int64)])
        shown = [(begin + len(before), end + len(before)) for begin, end in spans]
        return Built(
            tokens.astype(self.dataset.dtype),
            (first, first + len(answer)),
            [*shown, (first - len(question), len(tokens))],
        )

    def _text_and_answer(self, task: Task, start: int, room: int) -> tuple[np.ndarray, list[int]]:
        """Haystack and answer that together have `room` tokens.

        If the answer depends on the text, so does its length. Room is then reserved for it, and more if it does not
        fit; what is left is filled with line breaks.
        """
        reserved = TOKENS_OF_A_WORD * self._settings.words if task.reads_text else len(self._answer(task, ""))
        while True:
            text = self._haystack(start, room - reserved)
            answer = self._answer(task, self.tokenizer.decode(text.tolist()) if task.reads_text else "")
            if len(answer) <= reserved:
                break
            reserved = len(answer)
        return np.append(text, np.full(reserved - len(answer), self._line_break)), answer

    def _answer(self, task: Task, text: str) -> list[int]:
        return self.tokenizer.encode(f" {task.answer(text)}")

    def _haystack(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: tokens of the stream, with separators replaced by line breaks."""
        tokens = self.tokens(start, length)
        ids = self._separator["ids"]
        if ids and length >= len(ids):
            found = np.ones(length - len(ids) + 1, bool)
            for offset, id in enumerate(ids):
                found &= tokens[offset : offset + len(found)] == id
            for offset in range(len(ids)):
                tokens[np.flatnonzero(found) + offset] = self._line_break
        return tokens

    @property
    def _separator(self) -> dict[str, Any]:
        return (self.dataset.sidecar or {}).get("separator") or {"ids": []}

    @property
    def _separators(self) -> tuple[list[int], list[int]]:
        """The separator tokens at the begin and at the end of a document of this dataset."""
        ids = list(self._separator["ids"])
        return (ids, []) if self._separator.get("position") == "before" else ([], ids)

    @cached_property
    def _line_break(self) -> int:
        return self.tokenizer.encode("\n")[-1]

    @property
    def _shortest(self) -> int:
        return self._settings.min_length or self.seq_length

    @property
    def answer_only(self) -> bool:
        """Whether only answers count in the loss."""
        return self._settings.answer_only

    def _refuse_too_short(self) -> None:
        shortest = self._shortest
        most = max(self._task_tokens(number) for number in range(TRIAL_TASKS))
        if shortest < 2 * most:
            key = "synthetic.min_length" if self._settings.min_length else "data.seq_length"
            raise UserError(
                f"data.mixture: {self.name}: {key} {shortest}: notes, question and answer of task "
                f"{self._settings.task} take {most} tokens and must be less than half of it; write {2 * most} or more"
            )

    def _task_tokens(self, j: int) -> int:
        task = draw_task(self._settings, self._random(j, 1))
        written = "".join(f"\n{sentence}\n" for sentence in task.planted) + f"\n\n{task.question}\nAnswer:"
        answer = " strawberries," * self._settings.words if task.reads_text else f" {task.answer('')}"
        return len(self.tokenizer.encode(written + answer)) + len(self._separator["ids"])


class _TaskPiece(Piece):
    """Sample j of a stream of tasks; its text is built once."""

    def __init__(self, stream: TaskDocuments, j: int) -> None:
        self._stream, self._j = stream, j

    @cached_property
    def _built(self) -> Built:
        return self._stream.build(self._j)

    @property
    def tokens(self) -> StoredTokens:
        return StoredTokens(self._stream.seq_length + 1, self._copy)

    @property
    def starts(self) -> np.ndarray:
        return np.array([0, self.filled], np.int64)

    @property
    def filled(self) -> int:
        return self._stream.length_of(self._j)

    @property
    def cut(self) -> tuple[bool, bool]:
        return False, False  # a task is whole, although its haystack may cut documents

    @property
    def targets(self) -> np.ndarray | None:
        if not self._stream.answer_only:
            return None
        targets = np.zeros(self._stream.seq_length + 1, bool)
        targets[slice(*self._built.answer)] = True
        return targets

    @property
    def planted(self) -> list[Span]:
        return self._built.planted

    def _copy(self, first: int, out: np.ndarray) -> None:
        tokens = self._built.tokens[first : first + len(out)]
        out[: len(tokens)] = tokens
        out[len(tokens) :] = 0
