"""Rewards for answers that are one number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from gvpo_jax.rewards import RewardError, completion_text

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def exact_number(
    prompts: Sequence[Any], completions: Sequence[Any], solution: Sequence[Any], **_: Any
) -> list[float | RewardError]:
    """1.0 where the first number in the completion equals the solution as a number, else 0.0.

    Lists of n completions and n solutions in, n rewards out. Commas inside a number don't count. A
    solution that is no number fails its row.
    """
    return [_reward(*pair) for pair in zip(completions, solution, strict=True)]


def _reward(completion: Any, solution: Any) -> float | RewardError:
    try:
        wanted = _value(str(solution).strip())
    except InvalidOperation:
        wanted = Decimal("NaN")
    if not wanted.is_finite():
        return RewardError(f"the solution {solution!r} is not a number")
    found = _NUMBER.search(completion_text(completion))
    return float(found is not None and _value(found[0]) == wanted)


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))
