"""Readers of a config's tables, which name the key that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..checks import shown


def known(table: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """ValueError for a key that there is not."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is {table!r}, but it takes a table")
    for name in table:
        if name not in names:
            raise ValueError(f"{where} has a key {shown(name)!r}, but it takes {', '.join(names)}")


def part(kind: type, raw: Mapping[str, Any], name: str, defaults: Mapping[str, Any] | None = None) -> Any:
    """The settings of a table, its own values over `defaults`."""
    table = raw.get(name, {})
    known(table, [each.name for each in fields(kind)], name)
    try:
        return kind(**{**(defaults or {}), **table})
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def listed(raw: Mapping[str, Any], name: str, default: Sequence[Any]) -> Sequence[Any]:
    value = raw.get(name, default)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, but it takes a list")
    return value


def check_text(name: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{name} is {value!r}, but it takes a text")
    return value
