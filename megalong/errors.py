"""What a user can get wrong.

`UserError` is a `ValueError` whose message is one line: the key, the value, why it is wrong and what to write
instead. The command line prints that line and ends with exit status 2. Every other exception is a bug of ours:
it keeps its traceback and ends with exit status 1.
"""


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, told in one line."""
