"""What a user can get wrong.

`UserError` is a `ValueError` whose message is one line: the key, the value, why it is wrong and what to write
instead. The command line prints that line and ends with exit status 2. Every other exception is a bug of ours:
it keeps its traceback and ends with exit status 1.
"""


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, told in one line.

    Attributes:
        alone: that not every rank of a run has met it, so that it is printed by those that have, not by rank 0.
    """

    alone = False


class ForeignIdError(UserError):
    """A dataset holds an id that the model does not have. Ranks that read other samples know nothing of it."""

    alone = True
