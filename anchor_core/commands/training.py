"""The verb `train`."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from ..adapters.config import AdapterConfig
from ..checks import check_count
from ..concept import Concept
from ..data.pictures import bucket_sizes, load_references
from ..objectives import w_from_lambda
from ..training.events import Event, Tell
from ..training.methods import check_combination
from ..training.orders import Orders
from ..training.parallel import Workers
from ..training.precision import resolve
from ..training.presets import AUTO, preset_options
from ..training.settings import DataSettings, TrainSettings
from ..training.sweep import variants
from .repeating import Repeat, command
from .shared import check_writable, given, open_model, resolution
from .train_sweep import sweep


def train(options: Namespace) -> int:
    from ..data.cache import Cache
    from ..data.prepare import ClassPictures
    from ..training.bank import GB, Bank
    from ..training.run import run
    from ..training.saving import Files

    if options.lambda_ is not None:
        options.w = w_from_lambda(options.lambda_)
    settings, config, data = (given(options, kind) for kind in (TrainSettings, AdapterConfig, DataSettings))
    concept = Concept(options.subject, options.class_prompt)
    classes = ClassPictures(check_count("class_pictures", options.class_pictures), folder=options.cache)
    _check_precision(settings, options.dtype)
    prompts = [(concept.subject_prompt, concept.class_prompt)]
    check_combination(settings, config, prompts, data.caption_dropout)
    if options.sweep:
        variants(options.sweep, settings, config, prompts)
        if options.resume or settings.checkpoint_every:
            raise ValueError("sweep writes no checkpoints; leave --resume and --checkpoint_every out, and give --cache")
    repeat = None if options.from_report is None else Repeat(options.from_report)
    out, workers = check_writable(options.out), Workers.launched(int(os.environ.get("WORLD_SIZE", "1")))
    options.device = options.device or workers.device
    denoiser = open_model(options)
    settings, config = with_preset(options, denoiser.family, workers.is_first)
    settings = resolve(settings, denoiser)
    references = _references(options, denoiser, data)
    bank = Bank(denoiser, options.cache, GB * settings.bank)
    if options.sweep:
        several = variants(options.sweep, settings, config, prompts)
        return sweep(
            options, out, denoiser, several, references, concept, data, classes, bank, _bar, _signals,
        )  # fmt: skip
    if repeat is not None:
        repeat.check(references)
        for each in repeat.differences(denoiser.device) if workers.is_first else ():
            print(f"{each}: the last bits of the adapter may differ")
    with _bar(settings.steps, workers.is_first) as show, _signals() as orders:
        if repeat is not None:
            show = repeat.listening(show, denoiser, orders)
        outcome = run(
            denoiser, references, concept, settings, config, data, files=Files.beside(out / "adapter.safetensors"),
            class_pictures=classes, probe={"noises": 2, "seed": settings.seed}, tell=show, orders=orders,
            checkpoints=_checkpoints(options, out, settings), cache=Cache(denoiser, options.cache), workers=workers,
            bank=bank if options.cache else None,
        )  # fmt: skip
    if workers.is_first:
        options.device, size = str(denoiser.device), resolution(options, denoiser)
        _report(out, outcome, options, concept, references.names, command(options, size), config, data)
        if repeat is not None and outcome.made_with:
            print(repeat.verdict(outcome.made_with))
    return 130 if outcome.how == "cancelled" else 0


def with_preset(options: Namespace, family: str, told: bool) -> tuple[TrainSettings, AdapterConfig]:
    """The settings with the family's own options where none were given."""
    # Pictures have the size that the model itself names.
    given_here = {*options.given, "resolution"}
    taken = preset_options(options.preset, family, given_here, options.kind, options.optimizer)
    vars(options).update(taken)
    if taken and told:
        name = family if options.preset == AUTO else options.preset
        print(f"preset {name}: {', '.join(f'{key} {value}' for key, value in taken.items())}")
    return given(options, TrainSettings), given(options, AdapterConfig)


def _check_precision(settings: TrainSettings, dtype: str) -> None:
    if {settings.precision, dtype} == {"fp16", "bf16"}:
        raise ValueError(
            f"precision is {settings.precision!r}, but dtype is {dtype!r}, which does not mix with it; take the same, "
            "or fp32 for one"
        )


def _references(options: Namespace, denoiser, data: DataSettings):
    size = resolution(options, denoiser)
    sizes = bucket_sizes(size, 8 * denoiser.downscale) if data.buckets else size
    return load_references(options.references, sizes, masks=data.masks, captions=data.captions)


def _report(out: Path, outcome, options: Namespace, concept: Concept, names, asked, config, data) -> None:
    """`report.png`, `report.json` and a line, of a training that made a step."""
    from ..evaluation import report

    history = outcome.history
    if outcome.trained is None:
        print("cancelled before the first step; nothing was written")
        return
    path, *embedding = outcome.files
    made_with = dict(outcome.made_with)
    settings = made_with.pop("settings")
    figure = report.new_figure(9, 6.8)
    (drift, loss), (distances, levels) = figure.subplots(2, 2)
    report.draw_drift(drift, {settings["objective"]: history})
    report.draw_loss(loss, {settings["objective"]: history})
    report.draw_distances(distances, history)
    report.draw_levels(levels, history)
    written = {
        "adapter": path.name,
        "embedding": [path, *embedding][-1].name if config.vectors else None,
        "method": options.method,
        "preset": options.preset,
        "subject_prompt": concept.subject_prompt,
        "class_prompt": concept.class_prompt,
        "references": names,
        "command": asked,
        "settings": settings,
        "data": asdict(data),
        **asdict(config),
        "made_with": made_with,
        "history": history.to_dict(),
    }
    drift = dict(history.probes)[history.kept].drift
    state = f"cancelled after {len(history.losses)} steps; " if history.cancelled else ""
    print(f"{state}{path}  step {history.kept}, drift {drift:.3f}, {history.seconds:.0f} s")
    try:
        figure.savefig(out / "report.png")
        report.write_json(out / "report.json", written)
    except OSError as error:
        raise ValueError(
            f"--out: the adapter is in {path}, but its report cannot be written ({error.strerror}); make room in {out}"
        ) from error


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Tell]:
    """A listener that shows a progress bar on the terminal."""
    from tqdm import tqdm

    with tqdm(total=steps, desc="training", disable=not shown, delay=1e-3) as bar:
        loss = 0.0

        def show(event: Event) -> None:
            nonlocal loss
            if event.event == "step":
                loss = event.loss
                bar.update(event.step - bar.n)
            elif event.event == "measured" and event.step:
                bar.set_postfix(loss=f"{loss:.4f}", drift=f"{event.result.drift:.3f}")

        yield show


@contextmanager
def _signals() -> Iterator[Orders]:
    """Orders that the first Ctrl-C or SIGTERM cancels, after its step; a second one ends the process."""
    orders, before = Orders(), {}

    def cancel_once(*_) -> None:
        with suppress(ValueError):  # the last step is made: what is left is to save it
            orders.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, cancel_once)
    try:
        yield orders
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checkpoints(options: Namespace, out: Path, settings: TrainSettings):
    """Those of `out`, if some are to be written or read; another training's stay untouched."""
    from ..training.checkpoint import Checkpoints

    if not settings.checkpoint_every and not options.resume:
        return None
    folder = out / "checkpoints"
    if options.resume and not folder.is_dir():
        raise ValueError(f"--resume: there is no checkpoint in {folder}; leave the option out to start anew")
    checkpoints = Checkpoints(folder)
    if not options.resume and checkpoints.files():
        raise ValueError(f"--out: {folder} holds checkpoints of a training; give --resume or another folder")
    return checkpoints
