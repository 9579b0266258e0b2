"""The errors that are the user's to mend, and text that can't harm the terminal."""

import contextlib
import re
import sys

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong and how to mend it.

    The command line prints the line and exits with status 2; in a program it is an ordinary
    `ValueError`.
    """


class NotFinite(UserError):
    """The policy's numbers are NaN or infinite: it is not worth saving."""


def visible(text: str) -> str:
    """Control characters as escapes: a model's or a file's text must not steer the terminal."""
    return _CONTROL.sub(lambda m: "⏎" if m[0] == "\n" else f"\\x{ord(m[0]):02x}", text)


def one_line(text: str, limit: int = 500) -> str:
    """A text as one line of at most so many characters, without its middle if it is longer."""
    line = visible(text)
    half = (limit - 3) // 2
    return line if len(line) <= limit else f"{line[:half]}...{line[-half:]}"


def tell(text: str, *, error: bool = False) -> None:
    """Print a line, or nothing where nobody reads any more: that must not end a program."""
    stream = sys.stderr if error else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)
