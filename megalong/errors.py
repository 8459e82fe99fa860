"""What a user can get wrong.

`UserError` is a `ValueError` whose message is one line: the key, the value, why it is wrong and what to write
instead. The command line prints that line and ends with exit status 2. Every other exception is a bug of ours:
it keeps its traceback and ends with exit status 1.
"""

from typing import Literal

Speaker = Literal["world", "node", "rank"]


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, told in one line.

    Attributes:
        speaker: which of a run's processes prints the line. `world`: rank 0, because every rank meets the mistake;
            `node`: the first process of each node that meets it, as all processes of that node do; `rank`: every rank
            that meets it, and no other rank knows of it.
    """

    speaker: Speaker = "world"

    def __init__(self, message: str, speaker: Speaker | None = None) -> None:
        super().__init__(message)
        if speaker is not None:
            self.speaker = speaker


class ForeignIdError(UserError):
    """A dataset holds an id that the model does not have. Ranks that read other samples know nothing of it."""

    speaker: Speaker = "rank"
