"""One training, from a model, pictures, a concept and settings to a saved file: the same for node, verb and bench.

`run` is the whole; `fit` alone is for who trains several adapters on what `data.prepare` made once. What happens is
told as `events`; what is wanted meanwhile comes as `orders`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.config import AdapterConfig
from ..concept import Concept
from ..data.cache import Cache
from ..data.pictures import References
from ..data.prepare import ClassPictures, Material, prepare
from ..denoiser import Denoiser
from .bank import Bank
from .checkpoint import Checkpoints
from .events import Described, Ended, Event, Fitted, PhaseBegun, PictureMade, Saved, StepMade, Tell
from .history import History
from .memory import check_memory
from .methods import check_combination
from .orders import PICTURE, Orders
from .parallel import ALONE, Workers
from .precision import resolve
from .preview import Preview
from .provenance import provenance
from .saving import Files, Trained
from .settings import DataSettings, TrainSettings
from .trainer import TrainingDiverged, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a training ended (of `events.ENDINGS`), and what is left of it: nothing, if it made no step.

    `made_with` is the `provenance` of the files.
    """

    how: str
    history: History
    trained: Trained | None
    files: tuple[Path, ...]
    made_with: Mapping[str, Any] = field(default_factory=dict)


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
    bank: Bank | None = None,
) -> Outcome:
    """Check, attach, prepare, train, keep and save; the adapter stays attached.

    Args:
        references: at the sizes to train on.
        files: where the adapter goes; whatever ends the training after its first step, they hold the steps made.
        probe: options of the `DriftProbe` that is measured, None for none.
        orders: answered before each step, and in every gap of the preparation.
        picture_every: steps between two `PictureMade`; 0 for those that are ordered alone.
        bank: of anchors, as in `train`.

    Raises:
        TrainingDiverged: the loss or its gradient is not finite; says where the steps before are.
        ValueError: what `check_combination`, `build_dataset`, `train` and `Trained.save` refuse.
    """
    orders, settings = orders or Orders(), resolve(settings, denoiser)
    check_combination(settings, config, [(concept.subject_prompt, concept.class_prompt)], data.caption_dropout)
    settings.check_model(denoiser.prediction_type)
    orders.fix_steps(settings.fixed_length)
    denoiser.attach(config, seed=settings.seed)
    gaps, reads_class = _Gaps(tell, orders), settings.make_objective().reads_class_pictures
    try:
        with _told(tell):
            material = prepare(
                denoiser, references, concept, class_pictures=class_pictures if reads_class else None, probe=probe,
                seed=settings.seed, cache=cache, begin=gaps.begin, gap=gaps.pass_by, **data.build,
            )  # fmt: skip
            gaps.pass_by()
    except _EndedEarly:
        tell(Ended(orders.ending, kept=0, made=0))
        return Outcome(orders.ending, History(), None, ())
    return fit(
        denoiser, material, settings, files=files, tell=tell, orders=orders, checkpoints=checkpoints, workers=workers,
        picture_every=picture_every, bank=bank,
    )  # fmt: skip


@contextmanager
def _told(tell: Tell, made: int = 0, kept: int = 0) -> Iterator[None]:
    """What fails in the block is told as the end."""
    try:
        yield
    except _EndedEarly:
        raise
    except BaseException as error:
        tell(_failed(error, made, kept))
        raise


class _Gaps:
    """What a preparation does between two of its calls of the model: tell the phase, wait out a pause, or end."""

    def __init__(self, tell: Tell, orders: Orders):
        self.tell, self.orders, self.phase = tell, orders, "preparing"

    def begin(self, phase: str) -> None:
        self.pass_by()
        self.phase = phase
        self.tell(PhaseBegun(phase))

    def pass_by(self) -> None:
        for _ in self.orders.gap(self.tell, self.phase):
            pass
        if self.orders.ending:
            raise _EndedEarly


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
    bank: Bank | None = None,
) -> Outcome:
    """Train the adapter that is attached, keep what the settings or orders say, and save it; see `run`.

    A step that `Orders.keep` chose is read back from its file: `Outcome` and the files have it, the adapter does not.
    """
    orders = orders or Orders()
    with _told(tell):
        wanted = settings = resolve(settings, denoiser)
        settings = check_memory(settings, denoiser, material.dataset, material.concept, material.cache)
        if settings != wanted:
            names = ("micro_batch", "gradient_checkpointing")
            tell(Fitted({name: getattr(settings, name) for name in names}))
        orders.fix_steps(settings.fixed_length)
    going = _Going(denoiser, material, settings, files if workers.is_first else None, tell, orders, picture_every)
    try:
        going.begin()
        history = train(
            denoiser, denoiser.adapter, material.dataset, material.concept, settings,
            class_latents=material.class_latents, probe=material.probe, tell=going.tell, orders=orders,
            answer=going.answer, checkpoints=checkpoints, cache=material.cache, workers=workers,
            bank=bank,
        )  # fmt: skip
        going.made, going.kept = len(history.losses), history.kept
        how = next((how for how in ("cancelled", "stopped", "over_budget") if getattr(history, how)), "finished")
        trained, written = going.end()
    except BaseException as error:
        orders.close()
        going.keep_after(error)
        raise
    orders.close()
    if orders.kept is not None and written:
        with _told(tell, going.made, going.kept):
            trained, written = going.take(orders.kept, written)
        history.kept = orders.kept
    made_with: Mapping[str, Any] = {}
    if written:
        with _told(tell, going.made, history.kept):
            made_with = provenance(denoiser, material, going.planned, workers.count, written)
            tell(Described(made_with))
    tell(Ended(how, history.kept, len(history.losses)))
    return Outcome(how, history, trained, written, made_with)


def _failed(error: BaseException, made: int, kept: int = 0) -> Ended:
    how = "diverged" if isinstance(error, TrainingDiverged) else "failed"
    return Ended(how, kept, made, " ".join(str(error).split()))


class _Going:
    """A training that goes on: what is done between its steps, and what is saved of it.

    Attributes:
        made: steps so far.
        kept: the step whose weights the adapter has.
    """

    def __init__(self, denoiser, material: Material, settings, files: Files | None, tell: Tell, orders, every: int):
        self.denoiser, self.concept, self.settings, self.files = denoiser, material.concept, settings, files
        self.listener, self.orders, self.every, self.made, self.kept = tell, orders, every, 0, 0
        self.saved: dict[int, tuple[Path, ...]] = {}
        shape = tuple(material.latents.shape[1:])
        self.preview = Preview(denoiser, self.concept, shape, settings.guidance, settings.seed)

    @property
    def planned(self) -> TrainSettings:
        """The settings, with the steps that orders have added."""
        return replace(self.settings, steps=self.settings.steps + self.orders.more)

    def begin(self) -> None:
        if self.every:
            self.preview.conditions()  # before the loop, so that no text encoder is loaded in the middle of it
        self.listener(PhaseBegun("training"))

    def tell(self, event: Event) -> None:
        if isinstance(event, StepMade):
            self.made = self.kept = event.step
            if self.every and (event.step % self.every == 0 or event.step == event.steps):
                self.orders.picture_now()
        self.listener(event)

    def answer(self, what: str, step: int) -> None:
        if what == PICTURE:
            self.listener(PictureMade(step, self.concept.subject_prompt, self.preview.picture()))
        elif self.files is not None and step:
            _, self.saved[step] = self.save(step, self.files.at(step))
            self.orders.saved(step)

    def end(self) -> tuple[Trained | None, tuple[Path, ...]]:
        """What is kept of the whole training, and its files; nothing of one that made no step."""
        if not self.made:
            return None, ()
        self.listener(PhaseBegun("saving"))
        return self.save(self.kept, self.files)

    def save(self, step: int, files: Files | None) -> tuple[Trained, tuple[Path, ...]]:
        """The adapter as it is, and the files it was written to: none without `files`."""
        trained = Trained.of(self.denoiser, self.concept, self.planned, step)
        if files is None:
            return trained, ()
        written = trained.save(files)
        logger.info("the adapter of %d steps is in %s", step, written[0])
        self.listener(Saved(step, written))
        return trained, written

    def take(self, step: int, files: tuple[Path, ...]) -> tuple[Trained, tuple[Path, ...]]:
        """The adapter that was saved after `step` steps, in the place of the last one in `files`."""
        try:
            trained = Trained.read(self.saved[step])
        except ValueError as error:
            told = f"the LoRA of the {self.made} steps made is in {files[0]}"
            raise ValueError(f"step {step} cannot be kept: {error}; {told}") from error
        written = trained.save(Files(files[0], files[-1]))
        self.listener(Saved(step, written))
        return trained, written

    def keep_after(self, error: BaseException) -> None:
        """Save the steps made before `error`, and say so with it; its type stays, as hosts know theirs by it."""
        told = ""
        if self.made and self.files is not None:
            try:
                _, (path, *_) = self.save(self.kept, self.files)
                told = f"the LoRA of the {self.kept} steps before is in {path}"
            except Exception as unsaved:  # no room on the disk or in memory: what ended it is still what is raised
                told = str(unsaved)
        if told not in ("", str(error)):
            if isinstance(error, TrainingDiverged):
                error.args = (f"{error}; {told}",)
            else:
                error.add_note(told)
                logger.warning("%s", told)
        self.listener(_failed(error, self.made, self.kept))
