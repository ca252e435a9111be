"""What a benchmark runs: a TOML or JSON file, checked before anything is computed (docs/BENCH.md)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import check_choice, check_count, check_number, named, shown
from .claims import Claim, read_claims
from .figures import Lines, read_figures
from .keys import check_text, known, listed, part
from .rows import Sampling, Training, read_rows, row_names

SHIPPED = Path(__file__).with_name("configs")
SANDBOX = "sandbox"


@dataclass(frozen=True)
class Drawing:
    """How the pictures of every row are sampled, where it does not say otherwise.

    Args:
        steps, guidance: of the sampler.
        count: pictures of each prompt.
        batch: pictures in a pass; a subject's noise is the same for all rows and batches.
    """

    steps: int = 50
    guidance: float = 7.5
    count: int = 4
    batch: int = 4

    def __post_init__(self):
        for name in ("steps", "count", "batch"):
            check_count(name, getattr(self, name))
        check_number("guidance", self.guidance, minimum=0)


@dataclass(frozen=True)
class Probing:
    """The drift probes: options of `DriftProbe`, and how many class pictures the second one reads; 0 for none."""

    timesteps: int = 10
    noises: int = 2
    class_pictures: int = 6

    def __post_init__(self):
        check_count("timesteps", self.timesteps)
        check_count("noises", self.noises)
        check_count("class_pictures", self.class_pictures, minimum=0)


@dataclass(frozen=True)
class Source:
    """Where a model's subjects and the encoders of its scores are; for any model but the embedded one.

    Args:
        references: a folder with a folder of pictures for each subject.
        prompts: DreamBench's `prompts_and_classes.txt`, or a prompt a line with {} for the subject's words.
        classes: subject -> class word, where `prompts` does not tell them.
        resolution: of references and pictures; 0 for the model's own.
        dtype: of the model's weights.
        clip, dino: folders in transformers' layout, or names on the Hugging Face hub; without one, no such score.
    """

    references: str = ""
    prompts: str = ""
    classes: Mapping[str, str] = field(default_factory=dict)
    resolution: int = 0
    dtype: str = "fp32"
    clip: str = ""
    dino: str = ""

    def __post_init__(self):
        for name in ("references", "prompts", "clip", "dino"):
            check_text(name, getattr(self, name), empty=True)
        if not isinstance(self.classes, Mapping):
            raise ValueError(f"classes is {self.classes!r}, but it takes a table of subject = class word")
        for subject, word in self.classes.items():
            check_text(f"classes.{subject}", word)
        check_count("resolution", self.resolution, minimum=0)
        check_choice("dtype", self.dtype, ("fp32", "bf16", "fp16"))


@dataclass(frozen=True)
class Config:
    """A benchmark: subjects x seeds x rows, a row being a training or a way of sampling one.

    Attributes:
        model: `sandbox`, or what `train --model` takes.
        preset: of `training.presets`, whose options every training starts from; the embedded model has its own.
        subjects: their names; none for all of `source`.
        at: step counts at which a training is scored, besides its end.
        base: the row that the others are compared with, run by run.
        token, template: of the concept, "a photo of a {}".
        claims, figures: what its report says and draws.
        keep_pictures, keep_adapters: whether OUT keeps them.
        raw: the file's own content.
    """

    name: str
    model: str
    preset: str
    subjects: tuple[str, ...]
    seeds: tuple[int, ...]
    at: tuple[int, ...]
    base: str
    token: str
    template: str
    sampling: Drawing
    probe: Probing
    source: Source
    trainings: Mapping[str, Training]
    samplings: Mapping[str, Sampling]
    claims: Sequence[Claim]
    figures: Sequence[Lines]
    keep_pictures: bool
    keep_adapters: bool
    raw: Mapping[str, Any]

    @property
    def in_sandbox(self) -> bool:
        return self.model == SANDBOX

    @property
    def rows(self) -> list[str]:
        """In the order of the tables."""
        return row_names(self.trainings, self.samplings, self.in_sandbox)


def shipped() -> list[str]:
    """The names of the configs that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def read_config(file: str | Path, given: Mapping[str, Any] | None = None) -> Config:
    """A config of a file, or of the shipped ones by name.

    Args:
        given: `model` and keys of `source` in place of the file's.

    Raises:
        ValueError: naming the file and what in it is wrong.
    """
    path = Path(file)
    if not path.is_file() and str(file) in shipped():
        path = SHIPPED / f"{file}.toml"
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        told = f"config is {shown(file)!r}, which cannot be read ({error.strerror})"
        raise ValueError(f"{told}; give a TOML or JSON file, or one of {', '.join(shipped())}") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config is {shown(file)!r}, which is no TOML or JSON ({reason}); mend it there") from error
    if not isinstance(raw, dict):
        raise ValueError(f"config is {shown(file)!r}, which holds no table; begin with name = ...")
    with named(shown(file)):
        return parse(_with_paths(raw, path.parent, given or {}))


def _with_paths(raw: dict[str, Any], folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is `given` in its place, and the file's own paths from its folder on."""
    source = dict(raw.get("source", {})) if isinstance(raw.get("source", {}), Mapping) else raw["source"]
    if isinstance(source, dict):
        for name in ("references", "prompts", "clip", "dino"):
            path = source.get(name)
            if isinstance(path, str) and path and (folder / path).exists():
                source[name] = str((folder / path).resolve())
        source |= {name: value for name, value in given.items() if name != "model" and value is not None}
    made = dict(raw)
    if source:
        made["source"] = source
    model = made.get("model")
    if isinstance(model, str) and model != SANDBOX and model and (folder / model).exists():
        made["model"] = str((folder / model).resolve())
    if given.get("model") is not None:
        made["model"] = given["model"]
    return made


_KEYS = (
    "name", "model", "preset", "subjects", "seeds", "at", "base", "token", "template", "keep_pictures",
    "keep_adapters", "training", "sampling", "probe", "source", "trainings", "samplings", "claims", "figures",
)  # fmt: skip


def parse(raw: Mapping[str, Any]) -> Config:
    """A config of a file's content; ValueError naming the key that is wrong."""
    from .sandbox_settings import SAMPLING, TABLE_SUBJECTS

    known(raw, _KEYS, "the config")
    model = check_text("model", raw.get("model", SANDBOX), empty=True)
    if not model:
        raise ValueError("model is empty, but it takes sandbox, a diffusers folder or a checkpoint; give --model")
    inside = model == SANDBOX
    own = TABLE_SUBJECTS if inside else ()
    drawing = {**SAMPLING, "count": 1, "batch": 25} if inside else {}
    source = part(Source, raw, "source")
    if inside and raw.get("source"):
        raise ValueError("source is given, but the embedded model draws its own subjects; leave it out")
    for name in () if inside else ("references", "prompts"):
        if not getattr(source, name):
            raise ValueError(f"source.{name} is empty, but a model other than sandbox takes it; give it as an option")
    preset = check_text("preset", raw.get("preset", ""), empty=True)
    trainings, samplings = read_rows(raw, inside, preset)
    rows = row_names(trainings, samplings, inside)
    at = tuple(check_count("at", step) for step in listed(raw, "at", ()))
    config = Config(
        name=check_text("name", raw.get("name", "bench")),
        model=model,
        preset=preset,
        subjects=tuple(check_text("subjects", name) for name in listed(raw, "subjects", own)),
        seeds=tuple(check_count("seeds", seed, minimum=0) for seed in listed(raw, "seeds", (0,))),
        at=tuple(sorted(set(at))),
        base=check_text("base", raw.get("base", next(iter(trainings), "")), empty=True),
        token=check_text("token", raw.get("token", "sks")),
        template=check_text("template", raw.get("template", "a photo of a {}")),
        sampling=part(Drawing, raw, "sampling", drawing),
        probe=part(Probing, raw, "probe"),
        source=source,
        trainings=trainings,
        samplings=samplings,
        claims=read_claims(listed(raw, "claims", ()), rows),
        figures=read_figures(listed(raw, "figures", ()), rows),
        keep_pictures=check_choice("keep_pictures", raw.get("keep_pictures", not inside), (True, False)),
        keep_adapters=check_choice("keep_adapters", raw.get("keep_adapters", True), (True, False)),
        raw=raw,
    )
    if not config.trainings:
        raise ValueError("trainings is empty, but a benchmark takes one at least, such as [trainings.dreambooth]")
    if config.subjects and len(set(config.subjects)) < len(config.subjects):
        raise ValueError(f"subjects is {list(config.subjects)}, but it takes each name once")
    if config.base and config.base not in config.rows:
        raise ValueError(f"base is {config.base!r}, but it takes one of the rows: {', '.join(config.rows)}")
    return config
