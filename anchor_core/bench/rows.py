"""The rows of a benchmark: trainings, and ways of sampling them, from a config's tables to settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

from ..adapters.config import AdapterConfig
from ..checks import check_choice, check_count, check_number
from ..embeddings import ALIGNMENTS, NORM_MIX, Adjustment
from ..guidance import RULE_OPTIONS, Rule, make_rule
from ..objectives import matched_learning_rate
from ..training.methods import CLASS_PICTURES, method_options
from ..training.presets import PRESETS
from ..training.settings import DataSettings, TrainSettings
from .keys import check_text, known, listed

PRETRAINED = "pretrained, class prompt"
"""The row of the model as it is, asked for the class: what the others start from."""
ORACLE = "oracle, through the autoencoder"
"""The row of pictures that show the subject and follow every prompt: drawn by code, encoded and decoded. The embedded
model's subjects alone have it."""
UNTRAINED = (PRETRAINED, ORACLE)
"""The rows that no training makes; they have no place among the others."""
VECTORS = "vectors"
"""The adjustment of the token's own vectors, beside those of `ALIGNMENTS`."""

SCALE = {
    "learning_rate",
    "norm_learning_rate",
    "steps",
    "batch_size",
    "accumulation",
    "rank",
    "guidance",
    CLASS_PICTURES,
    "flip",
    "templates",
    "resizes",
}
"""Options of a published method that belong to the size of its model and data: the embedded model has its own, and
knows few of the words of other prompts."""

PARTS = {"settings": TrainSettings, "adapter": AdapterConfig, "data": DataSettings}
_OPTIONS = {part: [each.name for each in fields(kind) if "help" in each.metadata] for part, kind in PARTS.items()}
_TRAINING = [CLASS_PICTURES, *(name for names in _OPTIONS.values() for name in names)]
_SAMPLING = ("prompt", "guidance", "steps", "strength", "rule", *RULE_OPTIONS, "adjust", "alpha", "beta", "norm_mix")
PROMPTS = ("subject", "class")


@dataclass(frozen=True)
class Training:
    """A row that trains an adapter and samples it plainly."""

    name: str
    settings: TrainSettings
    adapter: AdapterConfig
    data: DataSettings
    class_pictures: int

    @cached_property
    def options(self) -> dict[str, Any]:
        """What decides its cells: what differs from the options' defaults, so that a new option changes nothing."""
        told = {CLASS_PICTURES: self.class_pictures}
        for part, kind in PARTS.items():
            own, plain = getattr(self, part), kind()
            for name in _OPTIONS[part]:
                if getattr(own, name) != getattr(plain, name):
                    told[name] = getattr(own, name)
        return told

    def for_class(self, word: str) -> AdapterConfig:
        """The adapter of a subject, {class} in `initial` being its class word."""
        return replace(self.adapter, initial=self.adapter.initial.replace("{class}", word))


@dataclass(frozen=True)
class Sampling:
    """A row that samples the adapter of a training in another way.

    Attributes:
        of: the training.
        prompt: of `PROMPTS`, which is asked for; by the class prompt a row tells what the adapter did to the class.
        own: the sampler's `guidance` and `steps`, where they are not the config's.
        adjust: of `ALIGNMENTS`, or `VECTORS`; empty for none.
    """

    name: str
    of: str
    prompt: str
    options: Mapping[str, Any]
    rule: Rule | None
    own: Mapping[str, Any]
    strength: float
    adjust: str
    adjustment: Adjustment | None

    @property
    def early(self) -> bool:
        return bool(getattr(self.rule, "early", False))


def row_names(trainings: Mapping[str, Training], samplings: Mapping[str, Sampling], sandbox: bool) -> list[str]:
    """Every row, in the order of the tables."""
    untrained = UNTRAINED if sandbox else (PRETRAINED,)
    return [*untrained, *trainings, *(row for name in trainings for row, way in samplings.items() if way.of == name)]


def read_rows(raw: Mapping[str, Any], sandbox: bool, preset: str) -> tuple[dict[str, Training], dict[str, Sampling]]:
    """The trainings and samplings of a config, by row; ValueError naming the row and its key.

    An option that is a list stands for as many rows, in whose names {option} is its value.
    """
    common = _base(sandbox, preset)
    given = raw.get("training", {})
    known(given, _TRAINING, "training")
    trainings: dict[str, Training] = {}
    for name, table in _tables(raw, "trainings"):
        known(table, ["method", "matched", *_TRAINING], f"trainings.{name}")
        for row, options in _expanded(f"trainings.{name}", name, table):
            _add(trainings, "trainings", row, partial(_training, row, options, common, given, sandbox))
    samplings: dict[str, Sampling] = {}
    for name, table in _tables(raw, "samplings"):
        known(table, ["of", *_SAMPLING], f"samplings.{name}")
        of = listed(table, "of", ())
        if not of:
            raise ValueError(f"samplings.{name}.of is empty, but it takes a list of trainings; name one at least")
        rest = {key: value for key, value in table.items() if key != "of"}
        for training in of:
            check_choice(f"samplings.{name}.of", training, trainings)
            for way, options in _expanded(f"samplings.{name}", name, rest):
                row = f"{training} + {way}"
                _add(samplings, "samplings", row, partial(_sampling, row, training, options, trainings))
    return trainings, samplings


def _tables(raw: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    tables = raw.get(name, {})
    if not isinstance(tables, Mapping):
        raise ValueError(f"{name} is {tables!r}, but it takes a table for each row, such as [{name}.anchored]")
    for row, table in tables.items():
        if not isinstance(table, Mapping):
            raise ValueError(f"{name}.{row} is {table!r}, but it takes a table of options")
        yield row, table


def _add(rows: dict[str, Any], where: str, row: str, make: Callable[[], Any]) -> None:
    if row in rows or row in UNTRAINED:
        raise ValueError(f"{where} has the row {row!r} twice, but every row takes a name of its own")
    try:
        rows[row] = make()
    except ValueError as error:
        raise ValueError(f"{where}.{row}: {error}") from error


def _expanded(where: str, name: str, table: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each combination of the options that are lists."""
    swept = {key: value for key, value in table.items() if isinstance(value, list)}
    for key, values in swept.items():
        if not values or f"{{{key}}}" not in name:
            raise ValueError(f"{where}.{key} is {values!r}, a list, but then the row's name takes {{{key}}} in it")
    for values in product(*swept.values()):
        chosen = dict(zip(swept, values))
        row = name
        for key, value in chosen.items():
            row = row.replace(f"{{{key}}}", f"{value:g}" if isinstance(value, (int, float)) else str(value))
        yield row, {**table, **chosen}


def _base(sandbox: bool, preset: str) -> dict[str, Any]:
    """What every training of the model starts from."""
    from .sandbox_settings import ADAPTER, SETTINGS
    from .sandbox_settings import CLASS_PICTURES as COUNT

    if sandbox:
        if preset:
            raise ValueError(f"preset is {preset!r}, but the embedded model has its own settings; leave it out")
        own = {name: getattr(SETTINGS, name) for name in _OPTIONS["settings"]}
        own |= {name: getattr(ADAPTER, name) for name in _OPTIONS["adapter"]}
        own["alpha"] = None if ADAPTER.alpha == ADAPTER.rank else ADAPTER.alpha  # follows a row's rank
        return own | {CLASS_PICTURES: COUNT}
    options = dict(PRESETS[check_choice("preset", preset, PRESETS)].options) if preset else {}
    options.pop("resolution", None)
    return {CLASS_PICTURES: 200} | options


def _training(row: str, table: dict[str, Any], common: dict, given: Mapping[str, Any], sandbox: bool) -> Training:
    table = dict(table)
    matched, method = table.pop("matched", None), table.pop("method", None)
    published = {} if method is None else method_options(check_text("method", method))
    if sandbox and method is not None:  # its form is its own, whole: of the bench's it takes the size
        published = {name: value for name, value in published.items() if name not in SCALE}
        common = {name: value for name, value in common.items() if name in SCALE}
    options = {**common, **given, **published, **table}
    made = {
        part: kind(**{name: options[name] for name in _OPTIONS[part] if name in options})
        for part, kind in PARTS.items()
    }
    if matched is not None:
        w, settings = check_number("matched", matched, minimum=0), made["settings"]
        rates = {name: getattr(settings, name) for name in ("learning_rate", "token_learning_rate")}
        told = {name: matched_learning_rate(rate, w) for name, rate in rates.items() if rate}
        made["settings"] = replace(settings, **told)
    return Training(row, **made, class_pictures=check_count(CLASS_PICTURES, options[CLASS_PICTURES]))


def _sampling(row: str, training: str, table: dict[str, Any], trainings: Mapping[str, Training]) -> Sampling:
    rule = {name: table[name] for name in RULE_OPTIONS if name in table}
    if rule and "rule" not in table:
        raise ValueError(f"{next(iter(rule))} is an option of a guidance rule; give rule too")
    how = {name: table[name] for name in ("alpha", "beta", "norm_mix") if name in table}
    adjust = table.get("adjust", "")
    if how and not adjust:
        raise ValueError(f"{next(iter(how))} is an option of an adjustment; give adjust too")
    adjustment = None
    if adjust:
        check_choice("adjust", adjust, (*ALIGNMENTS, VECTORS))
        if adjust == VECTORS and not trainings[training].adapter.vectors:
            raise ValueError(f"adjust is {VECTORS!r}, but {training} trains no vectors; take {ALIGNMENTS[0]}")
        prompts = {} if adjust == VECTORS or "beta" in how else {"norm_mix": NORM_MIX}
        adjustment = Adjustment(**{**prompts, **how})
    own = {}
    if "guidance" in table:
        own["guidance"] = check_number("guidance", table["guidance"], minimum=0)
    if "steps" in table:
        own["steps"] = check_count("steps", table["steps"])
    made = make_rule(check_text("rule", table["rule"]), **rule) if "rule" in table else None
    strength = check_number("strength", table.get("strength", 1.0))
    prompt = check_choice("prompt", table.get("prompt", PROMPTS[0]), PROMPTS)
    return Sampling(row, training, prompt, dict(table), made, own, strength, adjust, adjustment)
