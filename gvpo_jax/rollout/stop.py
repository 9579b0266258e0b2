"""Texts that end a completion: where in its tokens one is complete, and its text without it."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a completion, looked for in all that its tokens decode to.

    Special tokens are part of that text, so that one may be a stop string, as on servers.
    """

    texts: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"

    def end(self, tokens: Sequence[int]) -> int | None:
        """How many tokens there are up to the one that completes the first stop string, or None."""
        if not self._in(tokens):
            return None
        ends = range(1, len(tokens) + 1)
        return ends[bisect.bisect_left(ends, True, key=lambda n: self._in(tokens[:n]))]

    def _in(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self.texts)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]
