"""What may be a reward: a number of any library that float32 holds."""

from decimal import Decimal
from math import inf, nan, prod
from numbers import Real
from typing import Any

FLOAT32_MAX = float.fromhex("0x1.fffffep+127")  # the largest finite one


def as_number(value: Any) -> float | None:
    """A number as a float, also out of an array with one entry; None: it is no number.

    One that is too large for a float becomes infinite.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and prod(shape) == 1:  # NumPy's, jax's or PyTorch's
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return inf
    except ValueError:  # a signalling NaN
        return nan
