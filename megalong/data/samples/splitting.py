"""Held-out documents: which documents of a dataset are for training and which for validation.

`"99,1"` (Megatron's spelling) gives 99 % of the documents to training and 1 % to validation. Documents are shuffled
first, because corpora are often sorted. A document is never split between the two, so no held-out text is trained on.

The shuffle depends only on the number of documents, not on the run's seed or the mixture. Every run and every stage
therefore holds out the same documents, also of a dataset that occurs in a mixture twice.
"""

import numpy as np

from megalong.config.split import split_weights
from megalong.errors import UserError

PARTS = ("train", "validation")
SHUFFLE_SEED = 20250406  # arbitrary, but must not change: existing models would train on their held-out documents


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
    """The documents of `part`, of `documents` in all: int64, ascending.

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
