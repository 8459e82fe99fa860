"""Locates a chat template's `{% generation %}` marks in the text that it writes.

transformers locates them in tokens, and loses those of an answer that begins with white space and all after it. Here
the template itself writes a sentinel at both ends of what it marks. The sentinels are located in the text and removed
again:

    {% generation %}{{ content }}{% endgeneration %}
    {% call marked() %}{{ content }}{% endcall %}      with a macro before the template: ⟦{{ caller() }}⟧

    <|user|>Hi<|end|><|assistant|>⟦    return x<|end|>⟧   →   characters 31 to 50

Jinja treats both spellings alike, so white space control and scopes do not change. The sentinels are code points that
Unicode reserves for internal use; a pair that the text itself contains is not used.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Noncharacters (Unicode, section 23.7): a pair for the ends of a mark, and more pairs for texts that contain it.
SENTINELS = [(chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2)]
_MACRO = "megalong_marked"
_OPEN = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_CLOSE = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
Span = tuple[int, int]


def has_marks(template: str) -> bool:
    """Whether the template marks anything."""
    return _OPEN.search(template) is not None


def locate(template: str, text: str, render: Callable[[str], str]) -> list[Span] | None:
    """The marked spans [start, end) of `text`, in characters, in order.

    Args:
        text: what `template` writes.
        render: renders the same conversation with another template.

    Returns:
        None if the marks cannot be located: the template changes what it has marked (captures and trims it).
    """
    pair = next((pair for pair in SENTINELS if not any(sentinel in text for sentinel in pair)), None)
    if pair is None:
        return None
    written, spans, depth, start = render(_with_sentinels(template, *pair)), [], 0, 0
    plain: list[str] = []
    length = 0
    for piece in re.split(f"([{pair[0]}{pair[1]}])", written):
        if piece == pair[0]:
            start = length if depth == 0 else start
            depth += 1
        elif piece == pair[1]:
            depth -= 1
            if depth == 0 and length > start:
                spans.append((start, length))
        else:
            plain.append(piece)
            length += len(piece)
    return spans if depth == 0 and "".join(plain) == text else None


def _with_sentinels(template: str, start: str, end: str) -> str:
    """The template, changed to write a sentinel at both ends of each mark."""
    # Jinja removes the line break after the macro (`trim_blocks`), so the template still begins a line.
    macro = f"{{% macro {_MACRO}() %}}{start}{{{{ caller() }}}}{end}{{% endmacro %}}\n"
    opened = _OPEN.sub(rf"{{%\1 call {_MACRO}() \2%}}", template)
    return macro + _CLOSE.sub(r"{%\1 endcall \2%}", opened)
