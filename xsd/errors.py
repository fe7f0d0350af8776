"""The one error users meet."""


class XsdError(ValueError):
    """A mistake a user can mend: the message says what was wrong, where, and what to do.

    Commands print it as one line and exit with code 2.
    """
