"""Four kinds of task: what is planted into a text, the question at its end, and the answer.

    needle              one note with a number, asked for by its key
    multi_key           many such notes, of which one is asked for
    variable_tracking   values copied from register to register: which ones hold a certain value?
    word_count          nothing planted: which words are the most frequent in the text?

The kinds are RULER's (Hsieh et al., 2024), so that a model can be trained for what RULER measures. The wording is our
own, so that no model trains on RULER's. Everything is drawn from the given random state, in a fixed order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

_FIRST = (
    "amber ancient bitter bold brave bright broken calm clever copper crimson crooked curious dusty eager faint "
    "frozen gentle gilded hidden hollow humble idle ivory jolly keen lively lonely lucky mellow misty narrow nimble "
    "noble pale patient polished proud quiet rapid restless rusty scarlet silent silver sleepy solemn steady stormy "
    "sturdy sunny swift tender tidy velvet violet wandering weary winter wooden"
)
_SECOND = (
    "anchor archer badger barrel basket beacon bridge candle canyon castle cedar comet compass cottage cradle drummer "
    "falcon ferry fiddle forest fountain garden glacier harbor hermit island jacket kettle ladder lantern lizard "
    "meadow mirror mountain needle orchard otter painter parrot pebble pilot pioneer puzzle quarry rabbit raven river "
    "saddle sailor shepherd spindle summit tailor temple thicket tower valley wagon walnut window"
)
FIRST, SECOND = tuple(_FIRST.split()), tuple(_SECOND.split())
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
WORD = re.compile(r"[^\W\d_]{5,}")


class TaskSettings(Protocol):
    """`synthetic` of a domain in `data.mixture`."""

    @property
    def task(self) -> str: ...
    @property
    def min_length(self) -> int | None: ...
    @property
    def needles(self) -> int: ...
    @property
    def hops(self) -> int: ...
    @property
    def chains(self) -> int: ...
    @property
    def words(self) -> int: ...
    @property
    def answer_only(self) -> bool: ...
    @property
    def tokenizer(self) -> str | None: ...


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        planted: sentences to insert into the text, in this order.
        question: the question after the text.
        answer: computes the answer from the text.
    """

    planted: list[str]
    question: str
    answer: Callable[[str], str]

    @property
    def reads_text(self) -> bool:
        """Whether the answer depends on the text and not on what is planted."""
        return not self.planted


def draw_task(settings: TaskSettings, random: np.random.RandomState) -> Task:
    """Draw a task of the kind in `settings`."""
    if settings.task == "variable_tracking":
        return _variable_tracking(settings.chains, settings.hops, random)
    if settings.task == "word_count":
        return _word_count(settings.words)
    return _notes(settings.needles if settings.task == "multi_key" else 1, random)


def most_frequent(text: str, words: int) -> list[str]:
    """The most frequent words of five or more letters, in lower case; ties in alphabetical order."""
    counts = Counter(word.lower() for word in WORD.findall(text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:words]


def _notes(count: int, random: np.random.RandomState) -> Task:
    chosen = random.permutation(len(FIRST) * len(SECOND))[:count].tolist()
    keys = [f"{FIRST[number // len(SECOND)]} {SECOND[number % len(SECOND)]}" for number in chosen]
    values = _distinct(count, lambda: str(random.randint(10**6, 10**7)))
    asked = int(random.randint(count))
    planted = [
        f"Note to keep in mind: the code of the {key} is {value}." for key, value in zip(keys, values, strict=True)
    ]
    question = f"Question: what is the code of the {keys[asked]}, by the note in the text above?"
    return Task(planted, question, lambda text: values[asked])


def _variable_tracking(chains: int, hops: int, random: np.random.RandomState) -> Task:
    """The sentences of the chains are interleaved at random; each chain keeps its order."""
    names = _distinct(chains * (hops + 1), lambda: "".join(random.choice(list(LETTERS), 5)))
    values = _distinct(chains, lambda: str(random.randint(10**4, 10**5)))
    own = [names[chain * (hops + 1) : (chain + 1) * (hops + 1)] for chain in range(chains)]
    sentences = [
        [f"Register {registers[0]} is set to {value}."]
        + [f"Register {after} receives what register {before} holds." for before, after in pairwise(registers)]
        for registers, value in zip(own, values, strict=True)
    ]
    turns = [iter(chain) for chain in sentences]
    order = random.permutation(np.repeat(np.arange(chains), hops + 1)).tolist()
    planted = [next(turns[chain]) for chain in order]
    asked = int(random.randint(chains))
    question = (
        f"Question: which registers hold {values[asked]} at the end of the text above? Name them in the order in "
        "which they got it."
    )
    return Task(planted, question, lambda text: ", ".join(own[asked]))


def _word_count(words: int) -> Task:
    which = f"{words} words" if words > 1 else "word"
    question = (
        f"Question: which {which} of five or more letters does the text above hold most often? Write lower case, the "
        "most frequent first, ties in alphabetical order."
    )
    return Task([], question, lambda text: ", ".join(most_frequent(text, words)) or "none")


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
