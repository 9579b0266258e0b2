"""A reward that any model can climb, to try a set-up with."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from gvpo_jax.rewards import completion_text

_LETTERS = frozenset(string.ascii_lowercase)


def letter_share(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """The share of the completion's characters that are lowercase ASCII letters; 0.0 if empty."""
    texts = [completion_text(completion) for completion in completions]
    return [sum(c in _LETTERS for c in text) / max(1, len(text)) for text in texts]
