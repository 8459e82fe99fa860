"""Errors for a user's mistakes.

`UserError` is a `ValueError` with a one-line message: the key, the value, why it is wrong and what to write instead.
The command line prints that line and exits with status 2. Every other exception is a bug of ours: it keeps its
traceback and exits with status 1.
"""

from typing import Literal

Speaker = Literal["world", "node", "rank"]


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, in one line.

    Attributes:
        speaker: which of a run's processes prints the line. `world`: rank 0, because every rank has the error; `node`:
            the first process of each node that has it, because all processes of that node have it; `rank`: every rank
            that has it, because other ranks do not know of it.
    """

    speaker: Speaker = "world"

    def __init__(self, message: str, speaker: Speaker | None = None) -> None:
        super().__init__(message)
        if speaker is not None:
            self.speaker = speaker


class ForeignIdError(UserError):
    """A dataset contains an id that the model does not have. Ranks that read other samples do not know of it."""

    speaker: Speaker = "rank"
