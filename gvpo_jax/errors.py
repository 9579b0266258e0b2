"""The errors that are the user's to mend, and text that others may see."""

import contextlib
import enum
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_TOKEN = re.compile(
    r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|gsk_|xox[abp]-|AKIA|AIza|ya29\.)[\w.-]{8,}"
)
_LOGIN = re.compile(r"://[^/\s@]+@")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)

_SITE = "https://github.com/gvpo-jax/gvpo-jax/blob/main/"


class Page(enum.StrEnum):
    """The parts of the documentation that errors point to."""

    EXTRAS = "docs/install.md#extras"
    VERSIONS = "docs/install.md#versions"
    DEVICES = "docs/install.md#devices"
    MEMORY = "docs/scaling.md#less-memory"
    MODELS = "docs/models.md#where-a-model-comes-from"
    ROWS = "docs/data.md#your-own-rows"
    COLUMNS = "docs/data.md#other-forms-of-rows"
    STREAMING = "docs/data.md#streaming"
    PROMPTS = "docs/data.md#prompts"
    REWARDS = "docs/rewards.md#writing-one"
    REWARD_FAILED = "docs/rewards.md#when-one-fails"
    REWARD_MODELS = "docs/rewards.md#reward-models"
    REWARD_CHANGED = "docs/rewards.md#when-its-code-changes"
    EVALUATION = "docs/evaluation.md#sets-of-your-own"
    RESUMING = "docs/runs.md#resuming"
    SERVERS = "docs/servers.md#settings"
    WEIGHTS = "docs/servers.md#new-weights"

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return _SITE + self


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong and how to mend it.

    The command line prints the line and exits with status 2; in a program it is an ordinary
    `ValueError`. With a page, a second line says where to read more.

    Args:
        *args: the line.
        page: of the documentation, where it says more than the line.
    """

    page: Page | None = None

    def __init__(self, *args: Any, page: Page | None = None):
        super().__init__(*args)
        page, self.page = page or self.page, None
        if page is not None:
            self.explain(page)

    def explain(self, page: Page) -> None:
        """Point to a page, if this points to none yet; tracebacks show it too."""
        if self.page is None:
            self.page = page
            self.add_note(f"see {page.url}")


@contextlib.contextmanager
def explained_by(page: Page) -> Iterator[None]:
    """Lets the user's mistakes within point to a page; also a decorator of functions."""
    try:
        yield
    except UserError as error:
        error.explain(page)
        raise


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


def hide(text: str) -> str:
    """A text without the home folder, names of users in paths, keys and passwords."""
    secrets = {x for name, x in os.environ.items() if _SECRET.search(name) and len(x) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "...")
    text = _LOGIN.sub("://...@", _TOKEN.sub("...", text))
    for home in {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))}:
        if home.count("/") and home != "/":
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    names = {os.environ.get(name) for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    for user in filter(None, names):
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\:\s'\"]|$)", "USER", text)
    return re.sub(r"(/home/|[/\\]+Users[/\\]+)[^/\\\s:'\"]+", r"\1USER", text)


def tell(text: str, *, error: bool = False) -> None:
    """Print a line, or nothing where nobody reads any more: that must not end a program."""
    stream = sys.stderr if error else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)
