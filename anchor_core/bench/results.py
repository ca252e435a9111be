"""`semantic-anchor bench report`: the tables, claims and plots of a benchmark, from its stored cells alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import shown
from ..data.folder import read_text
from ..evaluation import report
from ..evaluation.intervals import Interval, bootstrap
from ..evaluation.metrics import rank
from ..writing import whole
from .cells import MAX_BYTES, SCORES, Cells, cell_file
from .claims import Verdict, judge
from .claims import markdown as claims_table
from .config import Config, parse
from .figures import draw
from .rows import UNTRAINED

_RANKED = ("picture_similarity", "text_alignment", "subject_fidelity")  # CLIP-I, CLIP-T and DINO, or their roles
_COMPARED = ("subject_fidelity", "picture_similarity", "text_alignment", "drift", "drift_class")
_DRIFTS = ("drift", "drift_class")


def write(folder: Path, out: Path, seed: int = 0) -> str:
    """Write `report.json`, `report.md` and a plot for each figure into `out`; gives the text.

    Args:
        folder: what `bench run` wrote into.
        seed: of the bootstrap.

    Raises:
        ValueError: if the folder holds no benchmark.
    """
    config, cells = read(folder)
    verdicts = [judge(claim, cells, seed) for claim in config.claims]
    out.mkdir(parents=True, exist_ok=True)
    plots = []
    for number, figure in enumerate(config.figures, 1):
        plots.append(f"figure_{number:02}.png")
        with whole(out / plots[-1]) as part:
            draw(figure, cells).savefig(part, format="png")
    text = markdown(config, cells, verdicts, plots, seed)
    report.write_json(
        out / "report.json",
        {
            "name": config.name,
            "subjects": cells.subjects,
            "seeds": cells.seeds,
            "missing": cells.missing,
            "failed": [{key: cell[key] for key in ("row", "subject", "seed", "failed")} for cell in cells.failed],
            "rows": {row: _row(row, cells, seed) for row in cells.rows},
            "claims": [verdict.to_dict() for verdict in verdicts],
            "figures": dict(zip(plots, (figure.name for figure in config.figures))),
        },
    )
    with whole(out / "report.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    return text


def read(folder: Path) -> tuple[Config, Cells]:
    """The config that a folder was begun with, and its cells."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"folder is {shown(folder)!r}, which holds no {file.name}; give the --out of `bench run`")
    held = _json(file)
    config = parse(held["config"])
    subjects, common, rows = held["subjects"], held["common"], held["rows"]
    options = {row: {} for row in config.rows if row in UNTRAINED} | {name: rows[name] for name in config.trainings}
    for name, way in config.samplings.items():
        sampling = {key: value for key, value in rows[name].items() if key != "of"}
        options[name] = {**rows[way.of], "sampling": sampling}
    cells = []
    for row, own in options.items():
        for subject in subjects:
            for seed in config.seeds:
                path = cell_file(folder, row, subject, seed)
                cell = _json(path) if path.is_file() else None
                if cell is not None and cell["options"] == {**common, **own}:
                    cells.append(cell)
    return config, Cells(config.rows, subjects, config.seeds, cells)


def _json(file: Path) -> Any:
    try:
        return json.loads(read_text(file, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it, and run the benchmark again") from error


def _row(row: str, cells: Cells, seed: int) -> dict[str, dict[str, Any]]:
    """Score -> interval, at each step count and at the end."""
    found = {}
    for at in (0, *cells.steps):
        scores = {score: cells.values(row, score, at) for score in SCORES}
        made = {score: bootstrap(values, seed=seed).__dict__ for score, values in scores.items() if values}
        if made:
            found[str(at) if at else "end"] = made
    return found


def markdown(
    config: Config, cells: Cells, verdicts: Sequence[Verdict], plots: Sequence[str] = (), seed: int = 0
) -> str:
    """The report as text: what is missing, the claims, and the tables after each step count.

    Args:
        plots: the files of the config's figures; without them it has none.
        seed: of the bootstrap.
    """
    lines = [f"# {config.name}", "", *_counts(cells), ""]
    if verdicts:
        lines += ["## Claims", "", claims_table(verdicts), ""]
    steps = [step for step in config.at if step in cells.steps]
    for at in (*steps, 0):
        if at and at == max(cells.steps, default=0):
            continue  # the table of the ends has it
        lines += [f"## After {at} steps" if at else "## At the end of each training", ""]
        lines += [_scores(config, cells, at, seed), "", *_differences(config, cells, at, seed)]
    for figure, plot in zip(config.figures, plots):
        lines += [f"![{figure.name}]({plot})", ""]
    return "\n".join(lines)


def _counts(cells: Cells) -> list[str]:
    total, there = len(cells.rows) * len(cells.runs), len(cells.by_key)
    lines = [
        f"{there} of {total} cells: {len(cells.rows)} rows, {len(cells.subjects)} subjects "
        f"({', '.join(cells.subjects)}), seeds {', '.join(map(str, cells.seeds))}. Means over subjects, with the 95 % "
        "interval of a bootstrap over subjects."
    ]
    for cell in cells.failed:
        lines.append(f"Left out: {cell['row']}, {cell['subject']}, seed {cell['seed']} ({cell['failed']}).")
    if cells.missing:
        some = "; ".join(cells.missing[:5])
        more = f" and {len(cells.missing) - 5} more" if len(cells.missing) > 5 else ""
        lines.append(f"Missing: {some}{more}.")
    return lines


def _scores(config: Config, cells: Cells, at: int, seed: int) -> str:
    """A row a line, with its place among those that have all scores of the rank."""
    found = {row: {score: cells.values(row, score, at) for score in SCORES} for row in cells.rows}
    shown_ = [score for score in SCORES if any(scores[score] for scores in found.values())]
    means = {
        row: {score: bootstrap(values, seed=seed) for score, values in scores.items() if values}
        for row, scores in found.items()
        if any(scores.values())
    }
    ranked = [score for score in _RANKED if score in shown_]
    rows = [row for row, each in means.items() if row not in UNTRAINED and all(score in each for score in ranked)]
    places = {}
    if ranked and rows:
        places = dict(zip(rows, zip(*rank([[means[row][score].mean for score in ranked] for row in rows]))))
    head = ["row", "runs", *(SCORES[score] for score in shown_), "mean rank", "place"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, each in means.items():
        runs = max(interval.runs for interval in each.values())
        last = [f"{places[row][0]:.2f}", str(places[row][1])] if row in places else ["", ""]
        cells_ = [row, str(runs), *(cell(each.get(score), score) for score in shown_), *last]
        lines.append("| " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def _differences(config: Config, cells: Cells, at: int, seed: int) -> list[str]:
    """Every row against `base`, and every sampling against its training's own row, run by run."""
    bases: dict[str, list[str]] = {}
    if config.base:
        bases[config.base] = [row for row in cells.rows if row not in (config.base, *UNTRAINED)]
    if not at:
        for row, way in config.samplings.items():
            if way.of != config.base:
                bases.setdefault(way.of, []).append(row)
    lines = []
    for base, rows in bases.items():
        made = [(row, differences(cells, row, base, at)) for row in rows]
        made = [(row, found) for row, found in made if any(found.values())]
        shown_ = [score for score in _COMPARED if any(found[score] for _, found in made)]
        if not shown_:
            continue
        head = ["row", "runs", *(SCORES[score] for score in shown_)]
        lines += [f"Difference to {base}, run by run:", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row, found in made:
            each = {score: bootstrap(values, seed=seed) for score, values in found.items() if values}
            runs = max(interval.runs for interval in each.values())
            values = [cell(each.get(score), score, "+") for score in shown_]
            lines.append("| " + " | ".join([row, str(runs), *values]) + " |")
        lines.append("")
    return lines


def differences(cells: Cells, row: str, base: str, at: int = 0) -> Mapping[str, dict[str, list[float]]]:
    """Score -> by subject, the row's minus the base's of each seed that has both: subjects differ more than rows do."""
    found: dict[str, dict[str, list[float]]] = {score: {} for score in _COMPARED}
    for subject, seed in cells.runs:
        ours, theirs = cells.scores(row, subject, seed, at), cells.scores(base, subject, seed, at)
        for score in _COMPARED:
            if ours is not None and theirs is not None and score in ours and score in theirs:
                found[score].setdefault(subject, []).append(ours[score] - theirs[score])
    return found


def cell(interval: Interval | None, score: str, sign: str = "") -> str:
    """Mean and interval, such as `0.350 [0.310, 0.392]`."""
    if interval is None:
        return "n/a"
    digits = 2 if score in _DRIFTS else 3
    ends = "" if interval.low is None else f" [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"
    return f"{interval.mean:{sign}.{digits}f}{ends}"
