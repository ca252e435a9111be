"""One training, from a model, pictures, a concept and settings to a saved file: the same for node, verb and bench.

`run` is the whole. Its two halves, `prepare` and `fit`, are for who trains several adapters on the same pictures. What
happens is told as `events`; what is wanted meanwhile comes as `orders`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.config import AdapterConfig
from ..concept import Concept
from ..data.cache import Cache
from ..data.dataset import Dataset
from ..data.pictures import References
from ..data.prepare import build_dataset, of_one_size, sample_class_latents
from ..denoiser import Denoiser
from ..drift import DriftProbe
from .checkpoint import Checkpoints
from .events import Ended, Event, PhaseBegun, PictureMade, Saved, StepMade, Tell
from .history import History
from .methods import check_combination
from .orders import PICTURE, Orders
from .parallel import ALONE, Workers
from .preview import Preview
from .saving import Files, Trained
from .settings import DataSettings, TrainSettings
from .trainer import TrainingDiverged, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassPictures:
    """The class pictures of objectives that read some: those given, or how the pretrained model makes them.

    Args:
        count: how many are made.
        pixels: (N, 3, H, W) in [0, 1] to take instead, called `name` in errors.
        folder: where made ones are kept for the next training.
        sampling: options of `sample_class_latents`.
    """

    count: int = 24
    pixels: Tensor | None = None
    name: str = "class_images"
    folder: Path | None = None
    sampling: Mapping[str, Any] | None = None

    def latents(
        self, denoiser: Denoiser, concept: Concept, shape: tuple[int, ...], seed: int, gap: Callable[[], None]
    ) -> Tensor:
        """(N, C, h, w)."""
        if self.pixels is None:
            cache = None if self.folder is None else Cache(denoiser, self.folder)
            options = {"seed": seed, "cache": cache, "gap": gap, **(self.sampling or {})}
            return sample_class_latents(denoiser, concept, self.count, shape, **options)
        try:
            return denoiser.encode_images(self.pixels)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Material:
    """What a training sees of the subject, made once.

    Attributes:
        latents: (N, C, h, w), those of the first picture's size, for what takes a stack.
        class_latents: (M, C, h, w), or None.
        cache: of encoded prompts.
    """

    concept: Concept
    dataset: Dataset
    latents: Tensor
    class_latents: Tensor | None
    probe: DriftProbe | None
    cache: Cache


@dataclass(frozen=True)
class Outcome:
    """How a training ended (of `events.ENDINGS`), and what is left of it: nothing, if it made no step."""

    how: str
    history: History
    trained: Trained | None
    files: tuple[Path, ...]


class _EndedEarly(Exception):
    """An order ended the preparation."""


def run(
    denoiser: Denoiser,
    references: References,
    concept: Concept,
    settings: TrainSettings,
    config: AdapterConfig,
    data: DataSettings,
    *,
    files: Files,
    class_pictures: ClassPictures,
    probe: Mapping[str, Any] | None,
    tell: Tell = lambda event: None,
    orders: Orders | None = None,
    checkpoints: Checkpoints | None = None,
    cache: Cache | None = None,
    workers: Workers = ALONE,
    picture_every: int = 0,
) -> Outcome:
    """Check, attach, prepare, train, keep and save; the adapter stays attached.

    Args:
        references: at the sizes to train on.
        files: where the adapter goes; whatever ends the training after its first step, they hold the steps made.
        probe: options of the `DriftProbe` that is measured, None for none.
        orders: answered before each step, and in every gap of the preparation.
        picture_every: steps between two `PictureMade`; 0 for those that are ordered alone.

    Raises:
        TrainingDiverged: the loss or its gradient is not finite; says where the steps before are.
        ValueError: what `check_combination`, `build_dataset`, `train` and `Trained.save` refuse.
    """
    orders = orders or Orders()
    check_combination(settings, config, [(concept.subject_prompt, concept.class_prompt)], data.caption_dropout)
    settings.check_model(denoiser.prediction_type)
    orders.fix_steps(settings.fixed_length)
    denoiser.attach(config, seed=settings.seed)
    reads_class = settings.make_objective().reads_class_pictures
    try:
        material = prepare(
            denoiser, references, concept, data, class_pictures=class_pictures if reads_class else None, probe=probe,
            seed=settings.seed, tell=tell, orders=orders, cache=cache,
        )  # fmt: skip
    except _EndedEarly:
        tell(Ended(orders.ending, kept=0, made=0))
        return Outcome(orders.ending, History(), None, ())
    return fit(
        denoiser, material, settings, files=files, tell=tell, orders=orders, checkpoints=checkpoints, workers=workers,
        picture_every=picture_every,
    )  # fmt: skip


def prepare(
    denoiser: Denoiser,
    references: References | Tensor,
    concept: Concept,
    data: DataSettings,
    *,
    class_pictures: ClassPictures | None,
    probe: Mapping[str, Any] | None,
    seed: int,
    tell: Tell = lambda event: None,
    orders: Orders | None = None,
    cache: Cache | None = None,
) -> Material:
    """Encode the pictures (or take their latents, (N, C, h, w)), make the class pictures, and set up the probe."""
    orders, cache = orders or Orders(), cache or Cache(denoiser)

    def gap() -> None:
        paused = False
        while orders.paused:
            if not paused:
                tell(PhaseBegun("paused"))
            paused = True
            orders.wait()
        if orders.ending:
            raise _EndedEarly

    def begin(phase: str) -> None:
        gap()
        tell(PhaseBegun(phase))

    begin("preparing")
    if isinstance(references, Tensor):
        dataset = Dataset.of_latents(references, concept)
    else:
        chosen = {name: getattr(data, name) for name in ("shuffle", "caption_dropout", "flip")}
        dataset = build_dataset(denoiser, references, concept, cache=cache, seed=seed, gap=gap, **chosen)
    latents, class_latents, drift = of_one_size(dataset), None, None
    if class_pictures is not None:
        begin("class_pictures")
        class_latents = class_pictures.latents(denoiser, concept, tuple(latents.shape[1:]), seed, gap)
    if probe is not None:
        begin("measuring")
        drift = DriftProbe(denoiser, latents, concept, **probe)
    gap()
    return Material(concept, dataset, latents, class_latents, drift, cache)


def fit(
    denoiser: Denoiser,
    material: Material,
    settings: TrainSettings,
    *,
    files: Files | None = None,
    tell: Tell = lambda event: None,
    orders: Orders | None = None,
    checkpoints: Checkpoints | None = None,
    workers: Workers = ALONE,
    picture_every: int = 0,
) -> Outcome:
    """Train the adapter that is attached, keep what the settings or orders say, and save it; see `run`.

    A step that `Orders.keep` chose is read back from its file: `Outcome` and the files have it, the adapter does not.
    """
    orders = orders or Orders()
    orders.fix_steps(settings.fixed_length)
    going = _Going(denoiser, material, settings, files if workers.is_first else None, tell, orders, picture_every)
    tell(PhaseBegun("training"))
    try:
        history = train(
            denoiser, denoiser.adapter, material.dataset, material.concept, settings,
            class_latents=material.class_latents, probe=material.probe, tell=going.tell, orders=orders,
            answer=going.answer, checkpoints=checkpoints, cache=material.cache, workers=workers,
        )  # fmt: skip
    except BaseException as error:
        orders.close()
        going.keep_after(error)
        raise
    orders.close()
    how = next((how for how in ("cancelled", "stopped", "over_budget") if getattr(history, how)), "finished")
    trained = written = None
    if history.losses:
        tell(PhaseBegun("saving"))
        trained, written = going.save(history.kept, files)
        if orders.kept is not None and written:
            trained, written = going.take(orders.kept, files)
            history.kept = orders.kept
    tell(Ended(how, history.kept, len(history.losses)))
    return Outcome(how, history, trained, written or ())


class _Going:
    """A training that goes on: what is done between its steps, and what is saved of it."""

    def __init__(self, denoiser, material: Material, settings, files: Files | None, tell: Tell, orders, every: int):
        self.denoiser, self.concept, self.settings, self.files = denoiser, material.concept, settings, files
        self.listener, self.orders, self.every, self.made = tell, orders, every, 0
        shape = tuple(material.latents.shape[1:])
        self.preview = Preview(denoiser, self.concept, shape, settings.guidance, settings.seed)
        if every:
            self.preview.conditions()  # before the loop, so that no text encoder is loaded in the middle of it

    def tell(self, event: Event) -> None:
        if isinstance(event, StepMade):
            self.made = event.step
            if self.every and (event.step % self.every == 0 or event.step == event.steps):
                self.orders.picture_now()
        self.listener(event)

    def answer(self, what: str, step: int) -> None:
        if what == PICTURE:
            self.listener(PictureMade(step, self.concept.subject_prompt, self.preview.picture()))
        elif self.files is not None and step:
            self.save(step, self.files.at(step))
            self.orders.saved(step)

    def save(self, step: int, files: Files | None) -> tuple[Trained, tuple[Path, ...]]:
        """The adapter as it is, and the files it was written to."""
        settings = replace(self.settings, steps=self.settings.steps + self.orders.more)
        trained = Trained.of(self.denoiser, self.concept, settings, step)
        if self.files is None or files is None:
            return trained, ()
        written = trained.save(files)
        logger.info("the adapter of %d steps is in %s", step, written[0])
        self.listener(Saved(step, written))
        return trained, written

    def take(self, step: int, files: Files) -> tuple[Trained, tuple[Path, ...]]:
        """The adapter that was saved after `step` steps, and the files it was copied to."""
        try:
            trained = Trained.read(self.files.at(step))
        except ValueError as error:
            told = f"the adapter of the {self.made} steps made is in {files.adapter}"
            raise ValueError(f"step {step} cannot be kept: {error}; {told}") from error
        written = trained.save(files)
        self.listener(Saved(step, written))
        return trained, written

    def keep_after(self, error: BaseException) -> None:
        """Save the steps made before `error`, and say so with it; its type stays, as hosts know theirs by it."""
        diverged, told = isinstance(error, TrainingDiverged), ""
        if self.made and self.files is not None:
            try:
                _, (path, *_) = self.save(self.made, self.files)
                told = f"the adapter of the {self.made} steps before is in {path}"
            except ValueError as unsaved:  # the disk is full, say: what ended the training is still what is told
                told = str(unsaved)
            if diverged:
                error.args = (f"{error}; {told}",)
            else:
                error.add_note(told)
                logger.warning("%s", told)
        self.listener(Ended("diverged" if diverged else "failed", self.made, self.made, " ".join(str(error).split())))
