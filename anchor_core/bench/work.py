"""One job of a benchmark, in whatever process: a training and its ways of sampling, for one subject and seed."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checks import reason
from ..training.events import Event
from ..training.history import History
from ..training.trainer import TrainingDiverged
from ..writing import whole
from .cells import read_cell, slug, write_cell
from .config import Config, parse
from .rows import ORACLE, PRETRAINED, UNTRAINED, Sampling, Training

EARLY = 3
"""Autoguidance's early checkpoint is of this part of the steps: a third."""


@dataclass(frozen=True)
class Job:
    """What is made in one go: `row`, a training or one of `UNTRAINED`, and the samplings of its adapter."""

    subject: str
    seed: int
    row: str
    samplings: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What became of a job; `failed` is what went wrong, empty if nothing did, with its traceback."""

    job: Job
    failed: str = ""
    trace: str = ""


def run_job(raw: Mapping[str, Any], out: str, common: Mapping[str, Any], job: Job, device: str, threads: int) -> Done:
    """Make the cells of a job that are missing; what fails in it is told, so that the other jobs go on.

    Args:
        raw: the config's own content.
        common: what besides a row decides its cells; `config.json` in `out` must hold the same.
    """
    try:
        import torch

        if threads:
            torch.set_num_threads(threads)
        config = parse(raw)
        _check_shared(Path(out), common)
        _process(config, Path(out), device).make(job, common)
    except Exception as error:  # of one job among many: it is told at the end, beside the cells that are there
        return Done(job, f"{type(error).__name__}: {reason(error)}", traceback.format_exc())
    return Done(job)


def _check_shared(out: Path, common: Mapping[str, Any]) -> None:
    file = out / "config.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("common") != common:
        raise ValueError(f"out is {out}, which this machine does not see; give a folder that all machines share")


_PROCESS: dict[tuple, _Process] = {}


def _process(config: Config, out: Path, device: str) -> _Process:
    """This process's model, opened once."""
    key = (json.dumps(config.raw, sort_keys=True), str(out), device)
    if key not in _PROCESS:
        _PROCESS.clear()
        _PROCESS[key] = _Process(config, out, device)
    return _PROCESS[key]


class _Process:
    """The model, the encoders, and the last subject and seed."""

    def __init__(self, config: Config, out: Path, device: str):
        self.config, self.out, self.device = config, out, device
        self._opened: tuple | None = None
        self._case: tuple | None = None

    def _open(self) -> tuple:
        """Denoiser, and a function from a subject's name to the subject."""
        if self._opened is None:
            import torch

            from ..backends.diffusers.denoiser import DiffusersDenoiser
            from .subjects import FolderSubject, SandboxSubject

            if self.config.in_sandbox:
                from ..sandbox.judge import Judge
                from ..sandbox.model import WEIGHTS

                judge = Judge()
                denoiser = DiffusersDenoiser.from_pretrained(WEIGHTS, self.device)
                self._opened = denoiser, lambda name: SandboxSubject(name, judge)
            else:
                from ..evaluation.encoders import open_encoders

                source = self.config.source
                dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[source.dtype]
                denoiser = DiffusersDenoiser.from_pretrained(self.config.model, self.device, dtype)
                some = source.clip or source.dino
                encoders = open_encoders(source.clip or None, source.dino or None, self.device) if some else None
                side = source.resolution or denoiser.default_resolution
                self._opened = denoiser, lambda name: FolderSubject(name, source, side, encoders)
        return self._opened

    def case(self, subject: str, seed: int):
        """Kept for the next job, which is mostly of the same subject and seed."""
        from .case import Case

        if self._case is None or self._case[0] != (subject, seed):
            denoiser, subject_of = self._open()
            folder = None if self.config.in_sandbox else self.out / "cache"
            self._case = (subject, seed), Case(denoiser, subject_of(subject), seed, self.config, folder)
        return self._case[1]

    def make(self, job: Job, common: Mapping[str, Any]) -> None:
        try:
            if job.row == PRETRAINED:
                _Making(self, job, common).pretrained()
            elif job.row == ORACLE:
                _Making(self, job, common).oracle()
            else:
                _Making(self, job, common).training(self.config.trainings[job.row])
        finally:
            if self._opened is not None:
                self._opened[0].detach()


class _Making:
    """The cells of one job."""

    def __init__(self, process: _Process, job: Job, common: Mapping[str, Any]):
        self.process, self.config, self.out, self.job, self.common = process, process.config, process.out, job, common

    @property
    def case(self):
        return self.process.case(self.job.subject, self.job.seed)

    def pretrained(self) -> None:
        """The model as it is, asked for the class: what text alignment is without a subject."""
        if self._held(PRETRAINED, {}) is None:
            began = time.perf_counter()
            scores, by_picture = self.case.score(token="", folder=self._pictures(PRETRAINED))
            self._write(PRETRAINED, {}, {"0": {**scores, **self.case.drifts()}}, by_picture, began)

    def oracle(self) -> None:
        """What the prompts ask for, as far as the autoencoder keeps it."""
        if self._held(ORACLE, {}) is None:
            began = time.perf_counter()
            scores, by_picture = self.case.oracle(self._pictures(ORACLE))
            self._write(ORACLE, {}, {"0": scores}, by_picture, began)

    def training(self, training: Training) -> None:
        ways = {row: {**training.options, "sampling": dict(self.config.samplings[row].options)}
                for row in self.job.samplings}  # fmt: skip
        missing = [row for row, options in ways.items() if self._held(row, options) is None]
        if not missing and self._held(training.name, training.options) is not None:
            return
        adapter = self._trained(training)
        if adapter is None:
            for row, options in {training.name: training.options, **ways}.items():
                if self._held(row, options) is None:
                    self._write_failed(row, options)
            return
        if self._held(training.name, training.options) is None:
            self._plainly(training, adapter)
        for row in missing:
            self._sampled(self.config.samplings[row], ways[row], adapter)
        if not self.config.keep_adapters:
            for name in (training.name, f"{training.name}, early"):
                self._adapter(name).unlink(missing_ok=True)

    _failure = ""

    def _trained(self, training: Training) -> dict[str, Any] | None:
        """What the adapter's file tells of its training; it is attached. None if the training diverged."""
        held = self._read(training)
        if held is not None:
            denoiser = self.case.denoiser
            denoiser.attach(training.for_class(self.case.subject.class_word), seed=self.job.seed)
            denoiser.adapter.load_state_dict(held[0])
            return held[1]
        scores: dict[str, dict] = {}
        early, at = max(1, training.settings.steps // EARLY), set(self.config.at)
        wants_early = any(self.config.samplings[row].early for row in self.job.samplings)

        def after(event: Event) -> None:
            if event.event != "step":
                return
            if wants_early and event.step == early:
                self._save(f"{training.name}, early", training, {})
            if event.step in at and event.step < training.settings.steps:
                scores[str(event.step)] = {**self.case.score()[0], **self.case.drifts()}

        try:
            history: History = self.case.train(training, after)
        except TrainingDiverged as error:
            self._failure = reason(error)
            return None
        about = {"scores": scores, "curve": self._curve(training, history), "seconds": history.seconds,
                 "kept": history.kept}  # fmt: skip
        self._save(training.name, training, about)
        return about

    def _curve(self, training: Training, history: History) -> list[dict]:
        from .case import point

        return [point(step, result, training.settings.keep_w) for step, result in history.probes]

    def _plainly(self, training: Training, about: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        scores, by_picture = self.case.score(folder=self._pictures(training.name))
        end = {str(training.settings.steps): {**scores, **self.case.drifts()}}
        more = {"curve": about["curve"], "kept": about["kept"], "training_seconds": round(about["seconds"], 2)}
        self._write(training.name, training.options, {**about["scores"], **end}, by_picture, began, **more)

    def _sampled(self, row: Sampling, options: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        from .rows import VECTORS

        began, case, folder = time.perf_counter(), self.case, self._pictures(row.name)
        if row.early:
            case.denoiser.adapter.hold_early(self._load(f"{row.of}, early"))
        if row.adjust == VECTORS:
            scores, by_picture = case.with_vectors(row, folder)
        else:
            scores, by_picture = case.score(row, token="" if row.prompt == "class" else None, folder=folder)
            plain = self._held(row.of, self.config.trainings[row.of].options)
            end = plain["scores"][max(plain["scores"], key=int)]
            scores |= {name: end[name] for name in ("drift", "drift_class") if name in end}  # they are the adapter's
        steps = str(self.config.trainings[row.of].settings.steps)
        self._write(row.name, options, {steps: scores}, by_picture, began)

    # Files

    def _held(self, row: str, options: Mapping[str, Any]) -> dict | None:
        return read_cell(self.out, row, self.job.subject, self.job.seed, {**self.common, **options})

    def _write(self, row, options, scores, by_picture, began: float, **more: Any) -> None:
        cell = {
            "row": row, "subject": self.job.subject, "seed": self.job.seed, "options": {**self.common, **options},
            "scores": scores, "by_picture": by_picture, "seconds": round(time.perf_counter() - began, 2),
            "device": self.process.device, **more,
        }  # fmt: skip
        write_cell(self.out, cell)

    def _write_failed(self, row: str, options: Mapping[str, Any]) -> None:
        cell = {"row": row, "subject": self.job.subject, "seed": self.job.seed, "failed": self._failure}
        write_cell(self.out, {**cell, "options": {**self.common, **options}})

    def _pictures(self, row: str) -> Path | None:
        if not self.config.keep_pictures:
            return None
        return self.out / "pictures" / slug(row) / str(self.job.seed) / self.job.subject

    def _adapter(self, name: str) -> Path:
        return self.out / "adapters" / slug(name) / f"{self.job.subject}-{self.job.seed}.safetensors"

    def _save(self, name: str, training: Training, about: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        file = self._adapter(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"options": {**self.common, **training.options}, **about}, allow_nan=False)
        with whole(file) as part:
            save_file(self.case.denoiser.adapter.state_dict(), part, {"bench": told})

    def _load(self, name: str) -> dict:
        from safetensors.torch import load_file

        return load_file(self._adapter(name))

    def _read(self, training: Training) -> tuple[dict, dict] | None:
        """The adapter and what its file tells, if it is of these options and has the early one that is wanted."""
        from safetensors import safe_open

        file = self._adapter(training.name)
        if not file.is_file():
            return None
        wants_early = any(self.config.samplings[row].early for row in self.job.samplings)
        if wants_early and not self._adapter(f"{training.name}, early").is_file():
            return None
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("bench", "{}"))
        wanted = json.loads(json.dumps({**self.common, **training.options}))
        return (self._load(training.name), about) if about.get("options") == wanted else None


def jobs_of(config: Config, subjects, seeds, rows) -> list[Job]:
    """The jobs of some rows, subject by subject, so that a process has the most in common with its last one."""
    jobs = []
    for subject in subjects:
        for seed in seeds:
            jobs += [Job(subject, seed, row, ()) for row in UNTRAINED if row in rows]
            for name in config.trainings:
                ways = tuple(row for row, way in config.samplings.items() if way.of == name and row in rows)
                if name in rows or ways:
                    jobs.append(Job(subject, seed, name, ways))
    return jobs


def common_of(config: Config) -> dict[str, Any]:
    """What besides a row's own options decides its cells."""
    told = {"token": config.token, "template": config.template, "at": list(config.at)}
    drawing = {name: value for name, value in asdict(config.sampling).items() if name != "batch"}
    told |= {"sampling": drawing, "probe": asdict(config.probe)}
    if not config.in_sandbox:
        source = asdict(config.source)
        told["source"] = {name: source[name] for name in ("classes", "resolution", "dtype", "clip", "dino")}
    return told
