"""The one error users meet, and what others say in a line."""


class XsdError(ValueError):
    """A mistake a user can mend: the message says what was wrong, where, and what to do.

    Commands print it as one line and exit with code 2.
    """


def reason(error: BaseException) -> str:
    """Why something failed, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
