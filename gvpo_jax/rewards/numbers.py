"""Rewards for answers that are one number."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from gvpo_jax.rewards import RewardError, batched, completion_text

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@batched
def exact_number(prompt: Any, completion: Any, solution: Any) -> float:
    """1.0 if the first number in the completion equals the solution as a number, else 0.0.

    Commas inside a number don't count. A solution that is no number fails its row.
    """
    try:
        wanted = _value(str(solution).strip())
    except InvalidOperation:
        wanted = Decimal("NaN")
    if not wanted.is_finite():
        raise RewardError(f"the solution {solution!r} is not a number")
    found = _NUMBER.search(completion_text(completion))
    return float(found is not None and _value(found[0]) == wanted)


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))
