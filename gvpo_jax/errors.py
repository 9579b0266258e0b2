"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong and how to mend it.

    The command line prints the line and exits with status 2; in a program it is an ordinary
    `ValueError`.
    """
