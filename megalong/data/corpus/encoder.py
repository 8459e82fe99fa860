"""Text to ids at the speed of the disk: `gigatoken`, where it says exactly what `tokenizers` says.

gigatoken tokenizes 270 MB of text a second on one core, `tokenizers` 4. The two are one algorithm in two programs, so
they can differ, and a wrong id is never noticed later. So each text goes to the one that is right for it:

    gigatoken     everything, save for what follows
    `tokenizers`  a text that spells a token added without being special ("<tool>"): rules on its surroundings differ
                  a text with a character that this Python's Unicode tables do not know yet: the tables of the two
                  libraries are of different years, so the new one takes for a letter what is unassigned to the other
                  under a tokenizer that normalizes (NFC): a text with a character newer than Unicode 3.2 that
                  normalization moves, composes or decomposes. Unicode never changes how an assigned character is
                  normalized, so tables of any year since 2002 agree on all others

Special tokens are left out of the copy that gigatoken loads: text never becomes one (see tokenizer.py).

What gigatoken cannot load is left to `tokenizers` as a whole, and said. Both are compared before the work, on probes of
our own and on the first texts of parts of the corpus; a difference ends it: `--encoder tokenizers` is the slow way out.
"""

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from megalong.data.memory import give_back_freed
from megalong.data.tokenizer import TextTokenizer, added_tokens_span
from megalong.errors import UserError

ENCODERS = ("gigatoken", "tokenizers")
SHORT = 1024  # characters; below, texts go over to gigatoken in one call, which costs an import
BLOCK_BITS = 8  # the table of guarded characters is made 256 code points at a time, when the first of them is met
REMEMBERED_CHARACTERS = 512 << 20  # of one process, about 200 MB of words; reached inside huge packed files only
SAMPLE_CHARACTERS = 4096  # compared of each sampled document

# What a tokenizer is most likely to treat in its own way: white space, digits, contractions, scripts, marks, emoji.
PROBES = (
    "", "a", " ", "\n", "\0", "\t\t x", "The year 2026, 12345678 and 3.14159.", "don't WE'LL I'M they've it's",
    "line\r\nline\r\n\r\n  indented\n\n\n", "def f(x):\n        return x+1  # done\n", "naïve café Ångström",
    "数学は楽しい。한국어 Ελληνικά русский العربية हिन्दी ไทย", "🙂👨‍👩‍👧🇩🇪 ﬁ ½ ² Ⅷ",
    "e\u0301 a\u0308\u0323 \u200d\ufeff\u2028\u00a0\u3000", "https://example.org/?q=a&b=c%20d",
    "$x^2 + \\frac{1}{2}$ <p class='x'>", "___ --- *** !!!???...", "ALLCAPS camelCase snake_case",
    # Marks out of order, singletons, Hangul and a composition exclusion: what NFC does; marks newer than Unicode 3.2.
    "q\u0307\u0323 \u212b\u2126 \u1100\u1161\u11a8 \u0958 \u0344", "q\u0312\u1dfa q\u0312\u07fd \U00011347\U0001133e",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What `tokenizers` says: the ids of `texts`."""

    texts: list[str]
    ids: list[list[int]]


def reference(tokenizer: TextTokenizer, texts: Iterable[str]) -> Reference:
    """Ask `tokenizers` for probes of our own and for the start of each of `texts`."""
    sample = [*PROBES, *(text[:SAMPLE_CHARACTERS] for text in texts)]
    return Reference(sample, tokenizer.encode_batch(sample))


class BatchEncoder:
    """Encodes many texts at once; the ids are those of `tokenizer.encode`.

    Attributes:
        fallback: why `tokenizers` does all of it, None where gigatoken works.

    Args:
        encoder: "gigatoken" wherever it can, or "tokenizers" alone.
    """

    def __init__(self, tokenizer: TextTokenizer, encoder: str = "gigatoken") -> None:
        self._tokenizer = tokenizer
        self._fast: Any = None
        self._met = 0
        self.fallback: str | None = "asked for"
        if encoder == "gigatoken":
            self._fast, self.fallback = _loaded(tokenizer)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end: uint32, number of ids of each text: int64 [texts])."""
        exact = self._exact(texts)
        self._forget(sum(map(len, texts)))
        if not exact and sum(map(len, texts)) < SHORT * len(texts):
            rows = self._fast.encode_batch([text.encode() for text in texts], parallel=False).layout
            offsets = np.asarray(rows.offsets.data, np.int64)
            return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        slow = iter(self._encode_exactly([text for text, told in zip(texts, exact, strict=False) if told]))
        ids = [
            next(slow) if exact and exact[place] else self._fast.encode(text.encode())
            for place, text in enumerate(texts)
        ]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return (np.concatenate(ids) if ids else np.empty(0, np.uint32)), lengths

    @property
    def vocabulary_size(self) -> int:
        """Highest id + 1, added tokens included."""
        if self._fast is None:
            return self._tokenizer.vocabulary_size
        return max(int(self._fast.vocab_size), self._tokenizer.highest_added_id + 1)

    def compare(self, reference: Reference) -> None:
        """Hold what `tokenizers` said against what this encoder says.

        Raises:
            UserError: they differ.
        """
        ids, lengths = self.encode(reference.texts)
        differing = [
            repr(text[:60])
            for text, expected, found in zip(
                reference.texts, reference.ids, np.split(ids, np.cumsum(lengths)[:-1]), strict=True
            )
            if found.tolist() != expected
        ]
        if differing:
            raise UserError(
                f"--tokenizer {self._tokenizer.path}: gigatoken and `tokenizers` disagree on {differing[0]}; "
                "use --encoder tokenizers, which is right and slow"
            )

    def _encode_exactly(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        ids = [np.array(ids, np.uint32) for ids in self._tokenizer.encode_batch(texts)]
        give_back_freed()
        return ids

    def _forget(self, characters: int) -> None:
        """Load gigatoken anew where it has met so much text: it remembers every word, without a limit."""
        self._met += characters
        if self._fast is not None and self._met > REMEMBERED_CHARACTERS:
            self._met, self._fast = characters, None
            self._fast = _loaded(self._tokenizer)[0]

    def _exact(self, texts: list[str]) -> list[bool]:
        """Which texts `tokenizers` must take; nothing where it takes none."""
        if self._fast is None:
            return [True] * len(texts)
        matched = self._tokenizer.matched
        if matched:
            together = "\n".join(texts)
            matched = [spelling for spelling in matched if spelling in together]
        normalizes = self._tokenizer.normalizes
        exact = [needs_guard(text, normalizes) or any(spelling in text for spelling in matched) for text in texts]
        return exact if any(exact) else []


def needs_guard(text: str, normalizes: bool) -> bool:
    """Whether `text` has a character on which Unicode tables of different years may differ.

    Args:
        normalizes: whether the tokenizer normalizes; characters that are new to normalization then count too.
    """
    if text.isascii():
        return False
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    codes = codes[codes > 127]
    blocks = np.unique(codes >> BLOCK_BITS)
    tables = np.stack([_guarded_of_block(block, normalizes) for block in blocks.tolist()])
    return bool(tables[np.searchsorted(blocks, codes >> BLOCK_BITS), codes & (1 << BLOCK_BITS) - 1].any())


@cache
def _guarded_of_block(block: int, normalizes: bool) -> np.ndarray:
    characters = map(chr, range(block << BLOCK_BITS, block + 1 << BLOCK_BITS))
    return np.array([unicodedata.category(c) == "Cn" or (normalizes and _normalized_anew(c)) for c in characters])


def _normalized_anew(character: str) -> bool:
    """Whether tables from before this character was assigned normalize (or lower) a text with it otherwise."""
    if unicodedata.ucd_3_2_0.category(character) != "Cn":
        return False
    moved, changed = unicodedata.combining(character), unicodedata.decomposition(character)
    return bool(moved or changed or character.lower() != character or character in _composed_anew())


@cache
def _composed_anew() -> frozenset[str]:
    """Characters that pairs newer than Unicode 3.2 are composed of; none of these is beyond plane 1."""
    pairs = [unicodedata.decomposition(chr(point)) for point in range(0x20000)]
    return frozenset(chr(int(code, 16)) for pair in pairs if pair and pair[0] != "<" for code in pair.split())


def _loaded(tokenizer: TextTokenizer) -> tuple[Any, str | None]:
    """gigatoken's tokenizer without any added token, or why there is none."""
    if tokenizer.matched and tokenizer.normalizes:
        return None, "its added tokens are looked for in normalized text"
    try:
        import gigatoken

        loaded = gigatoken.Tokenizer.from_json(_without_added_tokens(tokenizer.file.read_bytes())).backend
        give_back_freed()
        return loaded, None
    except ImportError as error:
        return None, f"gigatoken is not installed ({error})"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        return None, " ".join(str(error).split())


def _without_added_tokens(content: bytes) -> bytes:
    """The tokenizer.json with an empty list of added tokens."""
    span = added_tokens_span(content)
    if span is None:
        return json.dumps({**json.loads(content), "added_tokens": []}).encode()
    return content[: span.start] + b"[]" + content[span.stop :]
