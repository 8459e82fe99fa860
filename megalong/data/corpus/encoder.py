"""Text to IDs at the speed of the disk: `gigatoken`, wherever it gives exactly the IDs of `tokenizers`.

gigatoken tokenizes 270 MB of text per second and core, `tokenizers` 4. They implement the same algorithm independently,
so they can differ, and a wrong ID is never noticed later. Each text therefore goes to the one that is exact for it:

    gigatoken     everything else
    `tokenizers`  a text that spells an added token that is not special ("<tool>"): rules on its surroundings differ
                  a text with a character that this Python's Unicode tables do not contain: the tables of the two
                  libraries are from different years, so one may see a letter where the other sees no character
                  with a tokenizer that normalizes (NFC): a text with a character newer than Unicode 3.2 that
                  normalization moves, composes or decomposes. Unicode never changes how an assigned character is
                  normalized, so tables of any year since 2002 agree on all others

Special tokens are left out of the copy that gigatoken loads: text never becomes one (see tokenizer.py).

A tokenizer that gigatoken cannot load is left to `tokenizers` entirely, with a message. Before the run the two are
compared on fixed probes and on the first texts of some parts of the corpus. If they differ, the run ends, and
`--encoder tokenizers` is the slow alternative.
"""

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from megalong.data.memory import trim_heap
from megalong.data.tokenizer import TextTokenizer, added_tokens_span
from megalong.errors import UserError

ENCODERS = ("gigatoken", "tokenizers")
SHORT = 1024  # characters; shorter texts are passed to gigatoken in one call, at the cost of an import
BLOCK_BITS = 8  # the table of guarded characters is built lazily, 256 code points at a time
REMEMBERED_CHARACTERS = 512 << 20  # per process, about 200 MB of words; reached only inside huge compressed files
SAMPLE_CHARACTERS = 4096  # compared of each sampled document

# Where tokenizers are most likely to differ: white space, digits, contractions, scripts, marks, emoji.
PROBES = (
    "", "a", " ", "\n", "\0", "\t\t x", "The year 2026, 12345678 and 3.14159.", "don't WE'LL I'M they've it's",
    "line\r\nline\r\n\r\n  indented\n\n\n", "def f(x):\n        return x+1  # done\n", "naïve café Ångström",
    "数学は楽しい。한국어 Ελληνικά русский العربية हिन्दी ไทย", "🙂👨‍👩‍👧🇩🇪 ﬁ ½ ² Ⅷ",
    "e\u0301 a\u0308\u0323 \u200d\ufeff\u2028\u00a0\u3000", "https://example.org/?q=a&b=c%20d",
    "$x^2 + \\frac{1}{2}$ <p class='x'>", "___ --- *** !!!???...", "ALLCAPS camelCase snake_case",
    # For NFC: marks out of order, singletons, Hangul, a composition exclusion; and marks newer than Unicode 3.2.
    "q\u0307\u0323 \u212b\u2126 \u1100\u1161\u11a8 \u0958 \u0344", "q\u0312\u1dfa q\u0312\u07fd \U00011347\U0001133e",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Texts and the IDs that `tokenizers` gives them."""

    texts: list[str]
    ids: list[list[int]]


def reference(tokenizer: TextTokenizer, texts: Iterable[str]) -> Reference:
    """The IDs that `tokenizers` gives the probes and the start of each of `texts`."""
    sample = [*PROBES, *(text[:SAMPLE_CHARACTERS] for text in texts)]
    return Reference(sample, tokenizer.encode_batch(sample))


class BatchEncoder:
    """Encodes many texts at once; the IDs are those of `tokenizer.encode`.

    Attributes:
        fallback: why `tokenizers` encodes everything, None if gigatoken works.

    Args:
        encoder: "gigatoken" where it is exact, or only "tokenizers".
    """

    def __init__(self, tokenizer: TextTokenizer, encoder: str = "gigatoken") -> None:
        self._tokenizer = tokenizer
        self._fast: Any = None
        self._characters = 0  # that gigatoken has seen
        self.fallback: str | None = "--encoder tokenizers"
        if encoder == "gigatoken":
            self._fast, self.fallback = _loaded(tokenizer)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end: uint32, number of ids of each text: int64 [texts])."""
        exact = self._needs_tokenizers(texts)
        self._limit_cache(sum(map(len, texts)))
        if not exact and sum(map(len, texts)) < SHORT * len(texts):
            rows = self._fast.encode_batch([text.encode() for text in texts], parallel=False).layout
            offsets = np.asarray(rows.offsets.data, np.int64)
            return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        slow = iter(self._encode_exactly([text for text, needed in zip(texts, exact, strict=False) if needed]))
        ids = [
            next(slow) if exact and exact[place] else self._fast.encode(text.encode())
            for place, text in enumerate(texts)
        ]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return (np.concatenate(ids) if ids else np.empty(0, np.uint32)), lengths

    @property
    def vocabulary_size(self) -> int:
        """Highest ID + 1, added tokens included."""
        if self._fast is None:
            return self._tokenizer.vocabulary_size
        return max(int(self._fast.vocab_size), self._tokenizer.highest_added_id + 1)

    def compare(self, reference: Reference) -> None:
        """Compare the IDs of `reference` with this encoder's.

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
                "use --encoder tokenizers, which is exact but slow"
            )

    def _encode_exactly(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        ids = [np.array(ids, np.uint32) for ids in self._tokenizer.encode_batch(texts)]
        trim_heap()
        return ids

    def _limit_cache(self, characters: int) -> None:
        """Reload gigatoken after REMEMBERED_CHARACTERS: it caches every word, without a limit."""
        self._characters += characters
        if self._fast is not None and self._characters > REMEMBERED_CHARACTERS:
            self._characters, self._fast = characters, None
            self._fast = _loaded(self._tokenizer)[0]

    def _needs_tokenizers(self, texts: list[str]) -> list[bool]:
        """Which texts `tokenizers` must encode; an empty list if it needs to encode none."""
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
    """Whether `text` contains a character on which Unicode tables of different years may differ.

    Args:
        normalizes: whether the tokenizer normalizes; characters with newer normalization rules then count too.
    """
    if text.isascii():
        return False
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    codes = codes[codes > 127]
    blocks = np.unique(codes >> BLOCK_BITS)
    tables = np.stack([_guarded_block(block, normalizes) for block in blocks.tolist()])
    return bool(tables[np.searchsorted(blocks, codes >> BLOCK_BITS), codes & (1 << BLOCK_BITS) - 1].any())


@cache
def _guarded_block(block: int, normalizes: bool) -> np.ndarray:
    characters = map(chr, range(block << BLOCK_BITS, block + 1 << BLOCK_BITS))
    return np.array(
        [unicodedata.category(c) == "Cn" or (normalizes and _has_newer_normalization(c)) for c in characters]
    )


def _has_newer_normalization(character: str) -> bool:
    """Whether tables older than this character normalize (or lower-case) a text with it differently."""
    if unicodedata.ucd_3_2_0.category(character) != "Cn":
        return False
    moved, changed = unicodedata.combining(character), unicodedata.decomposition(character)
    return bool(moved or changed or character.lower() != character or character in _decomposition_parts())


@cache
def _decomposition_parts() -> frozenset[str]:
    """Parts of the characters that decompose canonically; no such character is beyond plane 1."""
    pairs = [unicodedata.decomposition(chr(point)) for point in range(0x20000)]
    return frozenset(chr(int(code, 16)) for pair in pairs if pair and pair[0] != "<" for code in pair.split())


def _loaded(tokenizer: TextTokenizer) -> tuple[Any, str | None]:
    """(gigatoken's tokenizer without any added token, None), or (None, why gigatoken cannot be used)."""
    if tokenizer.matched and tokenizer.normalizes:
        return None, "its added tokens are matched in normalized text"
    try:
        import gigatoken

        loaded = gigatoken.Tokenizer.from_json(_without_added_tokens(tokenizer.file.read_bytes())).backend
        trim_heap()
        return loaded, None
    except ImportError as error:
        return None, f"gigatoken is not installed ({error})"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is not an Exception
        return None, " ".join(str(error).split())


def _without_added_tokens(content: bytes) -> bytes:
    """The tokenizer.json with an empty list of added tokens."""
    span = added_tokens_span(content)
    if span is None:
        return json.dumps({**json.loads(content), "added_tokens": []}).encode()
    return content[: span.start] + b"[]" + content[span.stop :]
