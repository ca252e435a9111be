"""`train --from_report`: the training of a report once more, to the same adapter in every bit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..adapters.config import AdapterConfig
from ..adapters.metadata import base_fingerprint
from ..checks import reason, shown
from ..data.digest import digests
from ..data.pictures import References
from ..training.events import Event, Tell
from ..training.orders import Orders
from ..training.provenance import device_name, versions
from ..training.settings import DataSettings, TrainSettings

OPTION = "from_report"
_OWN = "model config resolution references subject class class_pictures device dtype".split()
"""Options of `train` beside those of the settings classes; a report has them under `command`."""


def with_report(arguments: Sequence[str]) -> list[str]:
    """The arguments of `train`, behind those of the report that `--from_report` names, so that they outrank them.

    Raises:
        ValueError: it is no report of a training.
    """
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    named.add_argument(f"--{OPTION}", f"--{OPTION.replace('_', '-')}")
    file = getattr(named.parse_known_args(list(arguments))[0], OPTION)
    if file is None:
        return list(arguments)
    return ["train", *_options(read_report(file)), *list(arguments)[1:]]


def read_report(file: str | Path) -> dict[str, Any]:
    """A `report.json` of `train`; ValueError if it is none."""
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--{OPTION}: {shown(file)} cannot be read ({reason(error)}); give a report.json") from error
    parts = {"command", "settings", "data", "history", "made_with"}
    if not isinstance(report, dict) or not all(isinstance(report.get(each), dict) for each in parts):
        raise ValueError(
            f"--{OPTION}: {shown(file)} is no report of a training, or one of an earlier version that does not hold "
            "enough to repeat it; give a report.json that train has written"
        )
    return report


def command(options: argparse.Namespace, resolution: int) -> dict[str, Any]:
    """What a report says of the command line, with paths that hold anywhere on this machine."""
    given = {name: getattr(options, {"class": "class_prompt"}.get(name, name)) for name in _OWN}
    for name in ("model", "config", "references"):
        if given[name] is not None and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    return {**given, "resolution": resolution}


def _options(report: Mapping[str, Any]) -> list[str]:
    """A report's training as options; those that are not of a plain value are left to their defaults."""
    known = {name: report["command"].get(name) for name in _OWN}
    for kind, said in ((TrainSettings, report["settings"]), (AdapterConfig, report), (DataSettings, report["data"])):
        known |= {field.name: said.get(field.name) for field in fields(kind) if "help" in field.metadata}
    made = ["--preset=none"]
    for name, value in known.items():
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, str | int | float):
            made.append(f"--{name}={value}")
    return made


class Repeat:
    """What holds a training to its report: the pictures, the base model, the last step; and what came of it."""

    def __init__(self, file: str | Path):
        self.file, self.report = file, read_report(file)
        self.made_with = self.report["made_with"]

    def check(self, references: References) -> None:
        """ValueError if these are not the pictures of the report."""
        said = self.made_with.get("pictures")
        theirs = {each.get("name"): each for each in said if isinstance(each, dict)} if isinstance(said, list) else {}
        for own in digests(references):
            other = theirs.pop(own["name"], {})
            differ = [kind for kind in ("picture", "mask", "caption") if own.get(kind) != other.get(kind)]
            if differ:
                raise ValueError(
                    f"--{OPTION}: the {differ[0]} of reference {own['name']} is not that of {shown(self.file)}; give "
                    "the folder as it was as --references"
                )
        if theirs:
            missing = ", ".join(shown(name, 60) for name in theirs)
            raise ValueError(f"--{OPTION}: {missing} of {shown(self.file)} is missing; give the folder as it was")

    def differences(self, device) -> list[str]:
        """What is another here than it was and may change the adapter's last bits, a phrase each."""
        here = {**versions(), "device": device_name(device)}
        then = {**dict(self.made_with.get("versions") or {}), "device": self.made_with.get("device")}
        return [
            f"{name} is {here.get(name, 'missing')} here and was {shown(then[name], 60)}"
            for name in then
            if name not in ("numpy", "pillow") and here.get(name) != then[name]
        ]

    def listening(self, tell: Tell, denoiser: Any, orders: Orders) -> Tell:
        """A listener that refuses another base model before the first step and stops where the report's steps end."""
        kept, planned = self.report["history"].get("kept"), self.report["settings"].get("steps")

        def listener(event: Event) -> None:
            if event.event == "phase" and event.phase == "training":
                own, said = base_fingerprint(denoiser), self.made_with.get("base_model")
                if own != said:
                    raise ValueError(
                        f"--model: its weights are {own}, but those of {shown(self.file)} are {shown(said, 60)}; give "
                        "that model"
                    )
            tell(event)
            if event.event == "step" and event.step == kept != planned:
                orders.stop()

        return listener

    def verdict(self, made_with: Mapping[str, Any]) -> str:
        """Whether the files are those of the report, in a line."""
        same = made_with.get("files") == self.made_with.get("files")
        return f"the files are {'the same as' if same else 'not the same as'} those of {shown(self.file)} in every bit"
