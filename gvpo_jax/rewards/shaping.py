"""Rewards for how a completion is written: its form, its length, its repetitions.

They give what TRL's functions of similar names give.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.rewards import RewardFunc, completion_text

_THINKS = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)


def think_format(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 if the completion begins with one `<think>...</think>`, else 0.0.

    Where these are special tokens, set `rewards.skip_special_tokens=false`.
    """
    return [float(_THINKS.match(completion_text(x)) is not None) for x in completions]


def soft_overlong_punishment(max_length: int, margin: int) -> RewardFunc:
    """Make a reward that falls from 0 to -1 over the last tokens before a length: DAPO's (13).

    Args:
        max_length: tokens; from here on the reward is -1. Usually
            `rollout.max_completion_length`.
        margin: tokens before it in which the reward falls; completions shorter than
            `max_length - margin` get 0.

    Source: DAPO, arXiv 2503.14476, equation 13.

    Raises:
        UserError: they are no such numbers.
    """
    if not 0 <= margin <= max_length:
        raise UserError(f"margin={margin} must be from 0 to max_length={max_length}")
    return functools.partial(soft_overlong, max_length=max_length, margin=margin)


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunc:
    """Make a reward that falls with the share of a completion's n-grams of tokens that repeat.

    It is `max_penalty * (1 - distinct / all)`; 0 for completions that are shorter than an n-gram.

    Args:
        ngram_size: tokens.
        max_penalty: 0 or less; nearly reached where all n-grams are alike.

    Source: "Demystifying Long Chain-of-Thought Reasoning", arXiv 2502.03373, appendix C.2.

    Raises:
        UserError: they are no such numbers.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise UserError(
            f"ngram_size={ngram_size} must be 1 or more, max_penalty={max_penalty} 0 or less"
        )
    return functools.partial(repetition, ngram_size=ngram_size, max_penalty=max_penalty)


def soft_overlong(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_length: int,
    margin: int,
    **_: Any,
) -> list[float]:
    """See `soft_overlong_punishment`."""

    def reward(length: int) -> float:
        over = length - (max_length - margin)
        if over <= 0:
            return 0.0
        return -1.0 if length > max_length else -over / margin

    return [reward(len(ids)) for ids in completion_ids]


def repetition(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: int,
    max_penalty: float,
    **_: Any,
) -> list[float]:
    """See `repetition_penalty`."""

    def reward(ids: Sequence[int]) -> float:
        ngrams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
        return max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    return [reward(ids) for ids in completion_ids]
