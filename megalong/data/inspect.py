"""`megalong data inspect`: counts, document lengths and the first documents of a dataset.

Separators are shown between ⟦ and ⟧, to check that documents end as they should:

    document 0: 7 tokens
    | Call me Ishmael.⟦<s>⟧
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalong.data.indexed import IndexedDataset
from megalong.data.lengths import length_histogram
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError
from megalong.runtime.folders import refuse_overwriting

BAR = 40
SET_ASIDE = {"bad": "records", "contaminated": "documents"}
HEAD, TAIL = 200, 40  # tokens shown of a long document
MARKS = (
    ("⟨", "⟩", "read, but not a target (loss mask)"),
    ("⟦", "⟧", "a separator, or how much is not shown"),
    ("«", "»", "inserted into the text (synthetic)"),
)


def inspect(
    prefix: str, documents: int = 3, tokenizer: str | None = None, png: str | None = None, overwrite: bool = False
) -> None:
    """Print counts and lengths of the dataset `prefix`, and its first `documents` documents.

    Args:
        png: where to plot the lengths of documents; None: no plot.
        tokenizer: folder to decode with. None: the one the dataset was made with, or IDs if that is gone.
        overwrite: overwrite an existing picture.

    Raises:
        UserError: the dataset cannot be read, the tokenizer is not the one it was made with, or the picture exists.
    """
    refuse_overwriting([Path(png)] if png is not None else [], "--png", overwrite)
    dataset = IndexedDataset(prefix)
    decoder = decoder_for(dataset, tokenizer)
    blocks = [_facts(dataset), _histogram(dataset)]
    blocks += [_document(dataset, number, decoder) for number in range(min(documents, dataset.num_documents))]
    print("\n\n".join([*blocks, *legend(blocks)]))
    if png is not None:
        from megalong.data.length_plot import plot_lengths  # matplotlib is slow to import

        plot_lengths(length_histogram(dataset.document_lengths), Path(prefix).name, Path(png))
        print(f"\n{png}")


def legend(blocks: Sequence[str]) -> list[str]:
    """One line that explains the marks that occur in `blocks`."""
    found = [f"{begin} {end} {meaning}" for begin, end, meaning in MARKS if any(begin in block for block in blocks)]
    return [f"legend: {' | '.join(found)}"] if found else []


def decoder_for(dataset: IndexedDataset, tokenizer: str | None) -> TextTokenizer | None:
    """The tokenizer that decodes `dataset`: `tokenizer`, else the recorded one, None if that is gone.

    Raises:
        UserError: the sidecar or the IDs show that the dataset was not made with `tokenizer`.
    """
    made_with = (dataset.sidecar or {}).get("tokenizer")
    if tokenizer is not None:
        given = TextTokenizer(tokenizer)
        if made_with and made_with["sha256"] != given.sha256:
            raise UserError(
                f"--tokenizer: {tokenizer} is not the one that {dataset.prefix} was made with "
                f"({made_with['name']}, {made_with['path']}): the text would be wrong; give that one"
            )
        if dataset.vocabulary_size is None:
            dataset.refuse_ids_from(given.vocabulary_size)
            dataset.ids = min(given.vocabulary_size, dataset.ids or given.vocabulary_size)
        return given
    if made_with and (Path(made_with["path"]) / "tokenizer.json").is_file():
        recorded = TextTokenizer(made_with["path"])
        return recorded if recorded.sha256 == made_with["sha256"] else None
    return None


def _facts(dataset: IndexedDataset) -> str:
    lengths, sidecar = dataset.document_lengths, dataset.sidecar or {}
    made_with, separator = sidecar.get("tokenizer"), sidecar.get("separator")
    unknown = "not recorded" if not sidecar else "none"
    lowest, highest, checked = dataset.range_of_ids()
    some = "" if checked == dataset.num_tokens else f" (of {checked:,} tokens checked)"
    rows = {
        "documents": f"{dataset.num_documents:,} ({int((lengths == 0).sum()):,} empty)",
        "sequences": f"{len(dataset.lengths):,}",
        "tokens": f"{dataset.num_tokens:,} ({dataset.dtype.name}, {dataset.num_tokens * dataset.dtype.itemsize:,} B)",
        "ids": f"{lowest:,} to {highest:,}{some}",
        "longest": f"{int(lengths.max(initial=0)):,} tokens",
        "mean": f"{dataset.num_tokens / max(dataset.num_documents, 1):,.1f} tokens",
        "tokenizer": f"{made_with['name']}, sha256 {made_with['sha256'][:12]}…" if made_with else unknown,
        "separator": _separator(separator) if separator else unknown,
    }
    set_aside = {name: sidecar.get(f"{name}_{what}", 0) for name, what in SET_ASIDE.items()}
    if any(set_aside.values()):
        rows["set aside"] = ", ".join(f"{count:,} {name} {SET_ASIDE[name]}" for name, count in set_aside.items())
    if sidecar.get("grouped_by"):
        rows["grouped by"] = sidecar["grouped_by"]
    return "\n".join([dataset.prefix] + [f"  {name:<10} {value}" for name, value in rows.items()])


def _separator(separator: dict[str, Any]) -> str:
    return f"{separator['text']!r} = {separator['ids']}, {separator.get('position', 'between')} documents"


def _histogram(dataset: IndexedDataset) -> str:
    lines = [f"  {'tokens':>21} {'documents':>12} {'share of all tokens':>20}"]
    for bucket in length_histogram(dataset.document_lengths):
        share = bucket["tokens"] / dataset.num_tokens
        span = f"{bucket['from']:,} to {bucket['below'] - 1:,}"
        lines.append(f"  {span:>21} {bucket['documents']:>12,} {share:>19.1%}  {'█' * round(share * BAR)}".rstrip())
    return "\n".join(lines)


def _document(dataset: IndexedDataset, number: int, decoder: TextTokenizer | None) -> str:
    ids = dataset.document(number).tolist()
    separator = (dataset.sidecar or {}).get("separator") or {"ids": [], "text": ""}
    size, first = len(separator["ids"]), separator.get("position") == "before"
    found = ids[:size] if first else ids[len(ids) - size :]
    separated = size > 0 and found == separator["ids"]
    body = (ids[size:] if first else ids[: len(ids) - size]) if separated else ids
    if len(body) > HEAD + TAIL:
        parts = [
            shown(body[:HEAD], decoder),
            f"⟦… {len(body) - HEAD - TAIL:,} tokens …⟧",
            shown(body[-TAIL:], decoder),
        ]
    else:
        parts = [shown(body, decoder)]
    if separated:
        mark = f"⟦{printable(separator['text'])}⟧" if decoder else f"⟦{shown(found, None)}⟧"
        parts.insert(0 if first else len(parts), mark)
    lines = (" " if decoder is None else "").join(parts).split("\n")
    return "\n".join([f"document {number}: {len(ids):,} tokens"] + [f"| {line}" for line in lines])


def shown(ids: list[int], decoder: TextTokenizer | None) -> str:
    """IDs as text that is safe to print, or as numbers without a decoder."""
    if decoder is None:
        return " ".join(str(id) for id in ids)
    return "\n".join(printable(line) for line in decoder.decode(ids).split("\n"))


def printable(text: str) -> str:
    """`text` with control characters escaped: a document must not control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
