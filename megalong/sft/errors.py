"""Why a conversation cannot be used."""


class BadSampleError(Exception):
    """A conversation that cannot be used.

    Attributes:
        reason: the rule that applies: empty, no_assistant, unknown_role, malformed or too_long.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
