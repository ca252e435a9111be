"""Pictures of any systems in one table: CLIP-I, CLIP-T, DINO, mean rank, real pictures against real ones, drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import reason, shown
from ..concept import word_pattern
from ..data.pictures import read_picture
from . import report
from .metrics import (
    METRICS,
    PUBLISHED_REAL,
    Average,
    Encoders,
    mean_pairwise_cosine,
    rank,
    real_against_real,
    text_alignment,
)
from .picture_folders import SubjectFiles
from .prompt_sets import split_prompts

PARTS = ("full", "subject", "context")
"""Of a prompt, in the split of CLIP-T."""
REAL = "real pictures, each with the others"
COLUMNS = 6
"""Of a contact sheet."""


class Comparison:
    """The scores of systems on subjects, added one by one, as a table.

    CLIP-I and DINO of a system on a subject are means over all pairs of its pictures with the references, CLIP-T over
    its pictures with their prompts; the table has the mean over subjects (DreamBooth's protocol, arXiv 2208.12242).
    """

    def __init__(self, encoders: Encoders, left_out: Iterable[str] = ()):
        self.encoders = encoders
        self._references: dict[str, dict[str, Tensor]] = {}
        self._scores: dict[str, dict[str, dict[str, tuple[float, int]]]] = {}
        self._drifts: dict[str, list[float]] = {}
        self._parts: dict[str, dict[str, dict[str, float]]] = {}
        self.left_out = list(left_out)
        """What was found and is in no figure, each with the reason."""

    def add_references(self, subject: str, pictures: Sequence[Tensor]) -> None:
        """A subject's real pictures, (3, H, W) each in [0, 1]."""
        self._references[subject] = self.encoders.embed(pictures)

    def add(
        self,
        system: str,
        subject: str,
        pictures: Sequence[Tensor],
        prompts: Sequence[str] | None = None,
        class_word: str | None = None,
    ) -> None:
        """Pictures, (3, H, W) each in [0, 1], that `system` made of `subject`.

        Args:
            prompts: one a picture, which name the class and not the subject's token; read for CLIP-T.
            class_word: where it is given, CLIP-T is split too: into that of the subject alone ("a dog") and that of
                the context ("in the snow"), which a collapsed subject takes over (arXiv 2506.22685). Pictures whose
                prompt has no context do not count there.

        Raises:
            ValueError: if there is no picture, or CLIP-T is to be measured and there is not one prompt a picture.
        """
        if not pictures:
            raise ValueError(f"pictures of {system} are none, but a comparison takes one at least")
        embedded, references = self.encoders.embed(pictures), self._references[subject]
        scores = {}
        for metric, encoder in (("clip_i", "clip"), ("dino", "dino")):
            if encoder in embedded:
                cosine = mean_pairwise_cosine(embedded[encoder], references[encoder])
                scores[metric] = cosine, len(pictures) * len(references[encoder])
        if self.encoders.text is not None:
            if prompts is None or len(prompts) != len(pictures):
                told = "none" if prompts is None else len(prompts)
                raise ValueError(f"prompts of {system} are {told}, but CLIP-T takes one a picture ({len(pictures)})")
            scores["clip_t"] = text_alignment(embedded["clip"], self.encoders.text(prompts)), len(pictures)
            if class_word is not None:
                self._parts.setdefault(system, {})[subject] = self._split(system, embedded["clip"], prompts, class_word)
        self._scores.setdefault(system, {})[subject] = scores

    def add_files(self, subject: str, found: SubjectFiles, class_word: str | None = None) -> dict[str, list[Tensor]]:
        """The pictures of a subject's files that can be read, for CLIP-T each with its prompt.

        A subject of which the references, or a system's pictures, cannot be read is left out.

        Returns:
            The first of the references ("") and of each system, for a `contact_sheet`; none of a subject left out.

        Raises:
            ValueError: as `add`.
        """
        references, _ = self._read(found.references, [], "the references")
        made = {name: self._read(*pictures, name) for name, pictures in found.made.items()}
        empty = [] if references else ["the references"]
        empty += [name for name, (pictures, _) in made.items() if not pictures]
        if empty:
            self.left_out.append(f"{shown(subject)}: no picture of {empty[0]} can be read")
            return {}
        self.add_references(subject, references)
        for name, (pictures, prompts) in made.items():
            self.add(name, subject, pictures, prompts, class_word)
        return {"": references[:COLUMNS], **{name: pictures[:COLUMNS] for name, (pictures, _) in made.items()}}

    def _read(self, files: Sequence[Path], prompts: Sequence[str], system: str) -> tuple[list[Tensor], list[str]]:
        pictures, told = [], []
        for number, file in enumerate(files):
            try:
                pictures.append(read_picture(file))
            except ValueError as error:
                self.left_out.append(f"{shown(file)} of {system}: {reason(error)}")
            else:
                told += prompts[number : number + 1]
        return pictures, told

    def _split(self, system: str, pictures: Tensor, prompts: Sequence[str], class_word: str) -> dict[str, float]:
        """CLIP-T with the full prompts, the subject alone and the context alone, of prompts that name the class."""
        named = [number for number, prompt in enumerate(prompts) if word_pattern(class_word).search(prompt)]
        if len(named) < len(prompts):
            bare = f"{len(prompts) - len(named)} prompts of {system}: they do not name the class {shown(class_word)!r}"
            self.left_out.append(f"{bare}, by which CLIP-T is split")
        texts = [prompts[number] for number in named]
        found = {}
        for part, told in zip(PARTS, (texts, *split_prompts(texts, class_word))):
            rows = {number: text for number, text in zip(named, told) if text}
            if rows:
                found[part] = text_alignment(pictures[list(rows)], self.encoders.text(list(rows.values())))
        return found

    def add_drift(self, system: str, drift: float) -> None:
        """The drift of a system's adapter for one of the subjects."""
        self._drifts.setdefault(system, []).append(drift)

    @property
    def subjects(self) -> list[str]:
        """Those that count."""
        return list(self._references)

    def result(self) -> dict[str, Any]:
        """Everything in the table, and the scores by subject, for `report.json`; systems in the order of their places.

        Without a system it is of real pictures with one another alone: a calibration of the encoders.

        Raises:
            ValueError: if there is no subject, or a system lacks one that another has.
        """
        if not self._references:
            raise ValueError(f"references: of no subject there is anything to compare: {'; '.join(self.left_out)}")
        wanted = list(next(iter(self._scores.values()), self._references))
        for system, scores in self._scores.items():
            if scores.keys() != set(wanted):
                raise ValueError(f"pictures of {system} are of {', '.join(scores)}, but others' of {', '.join(wanted)}")
        metrics = self.encoders.metrics
        means = {
            system: {metric: Average.of(*zip(*(scores[subject][metric] for subject in wanted))) for metric in metrics}
            for system, scores in self._scores.items()
        }
        table = [[row[metric].mean for metric in metrics] for row in means.values()]
        mean_ranks, places = rank(table) if table else ([], [])
        systems = {}
        for system, mean_rank, place in zip(means, mean_ranks, places):
            drifts = self._drifts.get(system)
            systems[system] = {
                "place": place,
                "mean_rank": mean_rank,
                **{metric: asdict(average) for metric, average in means[system].items()},
                "drift": asdict(Average.of(*_counted(drifts))) if drifts else None,
                "clip_t_parts": self._mean_parts(system),
                "by_subject": {
                    subject: {metric: score for metric, (score, _) in self._scores[system][subject].items()}
                    for subject in wanted
                },
            }
        return {
            "encoders": {metric: self.encoders.names.get(metric) for metric in metrics},
            "subjects": wanted,
            "real": self._real(wanted),
            "left_out": list(self.left_out),
            "systems": dict(sorted(systems.items(), key=lambda item: item[1]["place"])),
        }

    def _mean_parts(self, system: str) -> dict[str, float] | None:
        """Each part's mean over the subjects that have it; None where CLIP-T was not split."""
        by_subject = self._parts.get(system, {}).values()
        parts = {part for found in by_subject for part in found}
        means = {part: Average.of(*_counted(found[part] for found in by_subject if part in found)) for part in parts}
        return {part: asdict(mean) for part, mean in means.items()} or None

    def _real(self, subjects: Sequence[str]) -> dict[str, dict[str, Any]]:
        """CLIP-I and DINO of the references with one another; subjects with one picture do not count."""
        real = {}
        for metric, encoder in (("clip_i", "clip"), ("dino", "dino")):
            held = {subject: self._references[subject].get(encoder) for subject in subjects}
            found = {subject: each for subject, each in held.items() if each is not None and len(each) > 1}
            if found:
                values = {subject: real_against_real(references) for subject, references in found.items()}
                average = Average.of([*values.values()], [len(each) * (len(each) - 1) for each in found.values()])
                real[metric] = asdict(average) | {"by_subject": values}
        return real


def _counted(values: Iterable[float]) -> tuple[list[float], list[int]]:
    """Values that count alike."""
    listed = list(values)
    return listed, [1] * len(listed)


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a `Comparison.result()`, and what was left out.

    A cell is mean ± standard deviation over subjects and, in brackets, the 95 % interval of the mean; n/a for what was
    not measured.
    """
    lines = ["| system | " + " | ".join(METRICS.values()) + " | mean rank | place | drift |", "|" + "---|" * 7]
    for name, row in {REAL: result["real"], **result["systems"]}.items():
        cells = [_cell(row.get(metric), 3) for metric in METRICS]
        if "place" in row:
            cells += [f"{row['mean_rank']:.2f}", str(row["place"]), _cell(row["drift"], 2)]
        lines.append(f"| {name} | " + " | ".join(cells + [""] * (6 - len(cells))) + " |")
    split = {name: row["clip_t_parts"] for name, row in result["systems"].items() if row.get("clip_t_parts")}
    if split:
        lines += ["", "| CLIP-T of | full prompt | subject | context |", "|---|---|---|---|"]
        for name, parts in split.items():
            lines.append(f"| {name} | " + " | ".join(_cell(parts.get(part), 3) for part in PARTS) + " |")
    if not result["systems"] and result["real"]:
        known = ", ".join(f"{METRICS[metric]} {PUBLISHED_REAL[metric]}" for metric in result["real"])
        lines += ["", f"Over DreamBench's 30 subjects the papers have {known}."]
    if result.get("left_out"):
        lines += ["", f"Left out ({len(result['left_out'])}): {'; '.join(result['left_out'])}."]
    return "\n".join(lines)


def _cell(average: Mapping[str, float | None] | None, digits: int) -> str:
    if average is None:
        return "n/a"
    spread = "" if average["spread"] is None else f" ± {average['spread']:.{digits}f}"
    ends = [average.get(end) for end in ("low", "high")]
    interval = "" if None in ends else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{average['mean']:.{digits}f}{spread}{interval}"


def contact_sheet(references: Sequence[Tensor], pictures: Mapping[str, Sequence[Tensor]], columns: int = COLUMNS):
    """A matplotlib figure: the first references, and below them the first pictures of each system."""
    rows = {"references": references, **pictures}
    figure = report.new_figure(1.5 * columns, 1.7 * len(rows))
    for axes, (name, row) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items()):
        report.draw_pictures(axes, row[:columns], name)
    return figure
