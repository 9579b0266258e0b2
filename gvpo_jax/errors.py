"""The errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong and how to mend it.

    The command line prints the line and exits with status 2; in a program it is an ordinary
    `ValueError`.
    """


class NotFinite(UserError):
    """The policy's numbers are NaN or infinite: it is not worth saving."""
