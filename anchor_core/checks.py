"""Checks of settings: each returns the value, or raises a one-sentence ValueError that names the argument.

`option` declares a field of a settings class with its limits and help, of which command line and nodes are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any


def shown(text: Any, limit: int = 200) -> str:
    """Text of a file as terminals, logs and messages may have it: no control characters, at most `limit` characters.

    Line ends become spaces; what else moves a cursor, turns the direction of writing or has no character becomes `?`.
    The middle of a longer text is left out, so that a path keeps its file's name.
    """
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(" " if each.isspace() else each if each.isprintable() else "?" for each in text)


def reason(error: BaseException) -> str:
    """Why it happened, on one line as `shown`: the operating system's words, or else the error's own."""
    return shown(" ".join(str(getattr(error, "strerror", None) or error).split()))


@contextmanager
def named(name: Any) -> Iterator[None]:
    """A ValueError from inside begins with `name`, of the file or input that is at fault, if it does not yet."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(name)):
            raise
        raise ValueError(f"{name}: {error}") from error


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


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and limits: `choices`, `minimum`, `above`, `below`."""
    return field(default=default, metadata={"help": help, **limits})


def check_options(instance: Any) -> None:
    """Check every field made by `option` against its limits; ValueError naming the first that fails."""
    for each in fields(instance):
        _check(each, getattr(instance, each.name))


def _check(each: Field, value: Any) -> None:
    limits = {name: each.metadata[name] for name in ("minimum", "above") if name in each.metadata}
    if "choices" in each.metadata:
        check_choice(each.name, value, each.metadata["choices"])
    elif isinstance(each.default, bool):
        check_choice(each.name, value, (True, False))
    elif isinstance(each.default, int):
        check_count(each.name, value, **limits)
    elif isinstance(each.default, float):
        below = each.metadata.get("below")
        if check_number(each.name, value, **limits) >= (float("inf") if below is None else below):
            raise ValueError(f"{each.name} is {value!r}, but it takes a number below {below:g}")
