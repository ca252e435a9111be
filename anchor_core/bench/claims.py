"""What papers claim, as statistics of a benchmark's cells: shown, not shown, or the opposite, with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..checks import check_choice, check_count, check_number
from ..evaluation.intervals import Interval, bootstrap
from .cells import CURVES, SCORES, Cells
from .keys import check_text, known, listed

SHOWN, NOT_SHOWN, OPPOSITE, UNKNOWN = "shown", "not shown", "the opposite", "no runs"
_PAIRED, _ORDERED, _COURSE = ("higher", "lower", "same"), ("rises", "falls"), ("rises", "falls", "settles")


@dataclass(frozen=True)
class Claim:
    """One claim, of three kinds.

    - `of` against `against`: the difference of `score`, run by run, is expected to be `higher`, `lower`, or the `same`
      within `margin`. With `equal`, both are lines (a training over its step counts, or several rows), and the
      difference is taken where they are equal in that score: single points at equal steps mislead.
    - `of` alone, several rows: `score` `rises` or `falls` along them. The statistic is the change from the first to
      the last row on the straight line fitted to a run's values.
    - `curve` of `of`, a training: `reconstruction`, `drift` or `objective` over its steps `rises`, `falls`, or
      `settles`, which means that it changes less in the second half of the steps than in the first.

    Attributes:
        source: where it is made, such as "Table 1".
        at: the step count; 0 for the last.
    """

    name: str
    source: str
    of: tuple[str, ...]
    against: tuple[str, ...]
    score: str
    expect: str
    margin: float = 0.0
    at: int = 0
    equal: str = ""
    curve: str = ""


@dataclass(frozen=True)
class Verdict:
    """A claim with what the cells say of it; `left_out` counts the runs that lack a cell or where lines do not meet."""

    claim: Claim
    interval: Interval | None
    verdict: str
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_claims(tables: Sequence[Any], rows: Sequence[str]) -> tuple[Claim, ...]:
    """ValueError naming the claim and its key."""
    claims = []
    for number, table in enumerate(tables):
        where = f"claims[{number}]"
        known(table, list(Claim.__dataclass_fields__), where)
        try:
            claims.append(_claim(table, rows))
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from error
    return tuple(claims)


def _claim(table: Mapping[str, Any], rows: Sequence[str]) -> Claim:
    of, against = (_rows(name, table, rows) for name in ("of", "against"))
    curve = table.get("curve", "")
    claim = Claim(
        name=check_text("name", table.get("name", "")),
        source=check_text("source", table.get("source", ""), empty=True),
        of=of,
        against=against,
        score="" if curve else check_choice("score", table.get("score"), SCORES),
        expect=check_choice("expect", table.get("expect"), _COURSE if curve else _PAIRED if against else _ORDERED),
        margin=check_number("margin", table.get("margin", 0.0), minimum=0),
        at=check_count("at", table.get("at", 0), minimum=0),
        equal=check_choice("equal", table.get("equal", ""), ("", *SCORES)),
        curve=check_choice("curve", curve, ("", *CURVES)),
    )
    if not of:
        raise ValueError("of is empty, but it takes a row or a list of them")
    if claim.curve and (against or len(of) > 1):
        raise ValueError(f"curve is {curve!r}, but that is of one training alone; leave against out")
    if not claim.curve and not against and len(of) < 2:
        raise ValueError("of is one row, but without against it takes several, along which the score rises or falls")
    if against and not claim.equal and len(of) + len(against) > 2:
        raise ValueError("of and against are lines of rows, but then equal takes a score at whose values they meet")
    if (claim.expect == "same") != (claim.margin > 0):
        raise ValueError(f"margin is {claim.margin:g}, but it takes a number above 0 with expect same, and 0 otherwise")
    return claim


def _rows(name: str, table: Mapping[str, Any], rows: Sequence[str]) -> tuple[str, ...]:
    value = table.get(name, ())
    value = (value,) if isinstance(value, str) else tuple(listed(table, name, ()))
    return tuple(check_choice(name, row, rows) for row in value)


def judge(claim: Claim, cells: Cells, seed: int = 0) -> Verdict:
    """What the cells say of a claim; `seed` is of the bootstrap."""
    values: dict[str, list[float]] = {}
    left_out = 0
    for subject, number in cells.runs:
        found = _statistic(claim, cells, subject, number)
        if found is None:
            left_out += 1
        else:
            values.setdefault(subject, []).append(found)
    if not values:
        return Verdict(claim, None, UNKNOWN, left_out)
    interval = bootstrap(values, seed=seed)
    return Verdict(claim, interval, _verdict(claim, interval), left_out)


def _verdict(claim: Claim, interval: Interval) -> str:
    low, high = interval.low, interval.high
    if low is None:
        return NOT_SHOWN
    if claim.expect == "same":
        inside, outside = -claim.margin < low and high < claim.margin, low > claim.margin or high < -claim.margin
        return SHOWN if inside else OPPOSITE if outside else NOT_SHOWN
    if claim.expect in ("lower", "falls", "settles"):
        low, high = -high, -low
    return SHOWN if low > 0 else OPPOSITE if high < 0 else NOT_SHOWN


def _statistic(claim: Claim, cells: Cells, subject: str, seed: int) -> float | None:
    """Of one run; None if it lacks a cell, or lines do not meet."""
    if claim.curve:
        return _course(claim, cells.curve(claim.of[0], subject, seed, claim.curve))
    if claim.equal:
        lines = [cells.line(rows, subject, seed, claim.equal, claim.score) for rows in (claim.of, claim.against)]
        return None if None in lines else at_equal(*lines)
    values = [cells.value(row, subject, seed, claim.score, claim.at) for row in (*claim.of, *claim.against)]
    if None in values:
        return None
    if claim.against:
        return values[0] - values[1]
    return float(np.polyfit(range(len(values)), values, 1)[0] * (len(values) - 1))


def _course(claim: Claim, curve: Sequence[tuple[int, float]] | None) -> float | None:
    """Last minus first; for `settles`, the size of the second half's change minus that of the first half's."""
    if curve is None or len(curve) < 3:
        return None
    steps, values = zip(*curve)
    if claim.expect != "settles":
        return values[-1] - values[0]
    middle = float(np.interp((steps[0] + steps[-1]) / 2, steps, values))
    return abs(values[-1] - middle) - abs(middle - values[0])


def at_equal(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float | None:
    """Mean difference in y of two lines of points (x, y) at the x where both are, linear between points.

    It is taken at our points within the range of theirs, and at theirs within that of ours; None if there are none.
    """
    lines = [sorted(line) for line in (ours, theirs)]
    at = [x for x, _ in (*ours, *theirs) if all(line[0][0] <= x <= line[-1][0] for line in lines)]
    if not at:
        return None
    first, second = (np.interp(at, *map(list, zip(*line))) for line in lines)
    return float((first - second).mean())


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The claims as a table."""
    head = ["source", "claim", "measured", "mean", "95 %", "runs", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for each in verdicts:
        found, mean, span, runs = each.interval, "", "", "0"
        if found is not None:
            digits = 2 if (each.claim.curve or each.claim.score.startswith("drift")) else 3
            mean = f"{found.mean:+.{digits}f}"
            span = "" if found.low is None else f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
            runs = f"{found.runs} of {found.subjects} subjects"
        if each.left_out:
            runs += f", {each.left_out} left out"
        cells = [each.claim.source, each.claim.name, _measured(each.claim), mean, span, runs, each.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measured(claim: Claim) -> str:
    what = CURVES[claim.curve] if claim.curve else SCORES[claim.score]
    how = f"{what} {claim.expect}" + (f" within {claim.margin:g}" if claim.margin else "")
    return (
        how + (f" at equal {SCORES[claim.equal]}" if claim.equal else "") + (f", step {claim.at}" if claim.at else "")
    )
