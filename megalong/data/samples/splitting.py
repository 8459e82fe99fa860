"""Held-out documents: which documents of a dataset are for training and which for validation.

`"99,1"` (Megatron's spelling) gives 99 % of the documents to training and 1 % to validation. Documents are shuffled
first, since corpora are often sorted; a document is never cut in two, so nothing held out is ever trained on.

The shuffle depends on the number of documents alone, not on the run's seed nor on the mixture: every stage of a run,
every run, and a dataset that stands in a mixture twice hold out the same documents.
"""

import numpy as np

from megalong.config.split import split_weights
from megalong.errors import UserError

PARTS = ("train", "validation")
SHUFFLE_SEED = 20250406  # any constant; changing it would leak held-out documents of runs already trained


def split_shares(split: str) -> tuple[float, float]:
    """`"99,1"` → (0.99, 0.01): the shares of training and validation.

    Raises:
        UserError: not two numbers, a negative one, or nothing for training.
    """
    try:
        train, validation = split_weights(split)
    except ValueError as error:
        raise UserError(f"data.{error}") from None
    return train / (train + validation), validation / (train + validation)


def documents_of_part(documents: int, split: str, part: str, where: str) -> np.ndarray:
    """Numbers of the documents, of `documents` in all, that belong to `part`: int64, in rising order.

    Args:
        where: the dataset's path, for the error message.

    Raises:
        UserError: the part is empty.
    """
    share, _ = split_shares(split)
    border = round(documents * share)
    order = np.random.RandomState(SHUFFLE_SEED).permutation(documents)
    chosen = order[:border] if part == PARTS[0] else order[border:]
    if len(chosen) == 0:
        raise UserError(
            f"data.split: {split!r} of the {documents} documents in {where} leaves none for {part} "
            f"({border} train, {documents - border} validation); change the split or add documents"
        )
    belongs = np.zeros(documents, bool)
    belongs[chosen] = True
    return np.flatnonzero(belongs)
