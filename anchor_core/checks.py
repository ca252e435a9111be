"""Checks of settings: each returns the value, or raises a one-sentence ValueError that names the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_number(name: str, value: Any, *, minimum: float | None = None, above: float | None = None) -> float:
    """`value` as a finite float that is at least `minimum` or greater than `above`."""
    takes = "a finite number"
    if minimum is not None:
        takes += f" of at least {minimum:g}"
    if above is not None:
        takes += f" greater than {above:g}"
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, but it takes {takes}")
    if (minimum is not None and value < minimum) or (above is not None and value <= above):
        raise ValueError(f"{name} is {value!r}, but it takes {takes}")
    return float(value)


def check_count(name: str, value: Any, *, minimum: int = 1) -> int:
    """`value` as an int that is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} is {value!r}, but it takes a whole number of at least {minimum}")
    return int(value)


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """`value` if it is one of `choices`."""
    if value not in tuple(choices):
        raise ValueError(f"{name} is {value!r}, but it takes one of {', '.join(map(str, choices))}")
    return value
