"""`data.split` in Megatron's format: "99,1" is 99 parts for training and 1 for validation.

The schema uses it, and so does the data package, which does not import pydantic.
"""


def split_weights(split: str) -> tuple[float, float]:
    """Weights of training and validation: "99,1" gives (99.0, 1.0)."""
    try:
        train, validation = (float(part) for part in split.split(","))
    except ValueError:
        raise ValueError(f'split "{split}" must be two numbers, training and validation, such as "99,1"') from None
    if not (0 < train < float("inf") and 0 <= validation < float("inf")):
        raise ValueError(f'split "{split}" needs a positive share for training and none below zero, such as "99,1"')
    return train, validation
