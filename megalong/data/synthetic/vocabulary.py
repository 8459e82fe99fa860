"""The tokenizer of questions, which must be the one that the haystack was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalong.data.indexed import IndexedDataset
from megalong.data.token_ids import same_ids
from megalong.data.tokenizer import TextTokenizer
from megalong.errors import UserError


def find_tokenizer(dataset: IndexedDataset, named: str | None, domain: str) -> TextTokenizer:
    """The tokenizer of `dataset`: in the folder `named`, else in the one that the dataset's sidecar records.

    Raises:
        UserError: it is missing, unreadable, or not the one that the dataset was made with.
    """
    key = f"data.mixture: {domain}: synthetic.tokenizer"
    made_with = (dataset.sidecar or {}).get("tokenizer")
    if named is None and made_with is None:
        raise UserError(
            f"{key}: {dataset.prefix} does not say which tokenizer it was made with; write that tokenizer's folder"
        )
    folder = Path(named) if named is not None else Path(made_with["path"])  # type: ignore[index]
    if named is None and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{key}: the tokenizer that {dataset.prefix} was made with is no longer in {folder}; write its new folder"
        )
    try:
        found = TextTokenizer(folder)
        found.encode("")
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('--tokenizer: ')}") from None
    if made_with is None and found.vocabulary_size > np.iinfo(dataset.dtype).max + 1:
        raise UserError(
            f"{key}: {folder} has {found.vocabulary_size} ids, too many for the {dataset.dtype.name} of "
            f"{dataset.prefix}: it was made with another tokenizer; give that one"
        )
    if made_with is not None and not same_ids(made_with, found.described()):
        raise UserError(
            f"{key}: {folder} is not the tokenizer that {dataset.prefix} was made with ({made_with['name']}, sha256 "
            f"{made_with['sha256'][:12]}…): its ids would mean other text; give that one"
        )
    return found
