"""The training loop: an objective, an adapter, a history, and checkpoints to go on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..concept import Concept
from ..data.cache import Cache
from ..data.dataset import Dataset, Example
from ..denoiser import Denoiser
from ..devices import own_random_state
from ..drift import LEVELS, DriftProbe, tally
from .bank import Bank
from .batches import Batches
from .checkpoint import Checkpoints
from .events import Measured, StepMade, Tell
from .gradient_checkpointing import checkpointed
from .history import History
from .keeping import Candidates
from .methods import check_combination
from .optimizers import AveragedWeights, make_optimizer, make_schedule
from .orders import Orders
from .parallel import ALONE, Workers
from .precision import LOWEST_SCALE, autocast_dtype, make_scaler, resolve
from .resuming import resume, state_of
from .settings import TrainSettings

logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite, or in fp16 at every scale of the loss. The adapter still holds
    its last finite weights."""


def train(
    denoiser: Denoiser,
    adapter: Adapter,
    references: Dataset | Tensor,
    concept: Concept,
    settings: TrainSettings,
    *,
    class_latents: Tensor | None = None,
    probe: DriftProbe | None = None,
    tell: Tell | None = None,
    orders: Orders | None = None,
    answer: Callable[[str, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
    cache: Cache | None = None,
    workers: Workers = ALONE,
    bank: Bank | None = None,
) -> History:
    """Train `adapter`, which is attached to `denoiser`, in place.

    Every draw comes from one CPU generator in a fixed order (references, noise levels, noise; then, for an objective
    that reads class pictures, the same three for those), so that two backends see the same training. The global
    random state is left as it was.

    Args:
        references: a dataset, or scaled latents (N, C, h, w) that all have the concept's two prompts.
        class_latents: (M, C, h, w), for prior preservation.
        probe: measured before the first step, every `settings.probe_every` steps, and after the last.
        tell: is told `Resumed` where it goes on from a checkpoint, `StepMade` after each step and `Measured` after each
            probe; what it raises ends the training and is passed on.
        orders: answered before each step and after the last.
        answer: given `orders.PICTURE` or `orders.SAVE` and the steps made, while the adapter has the weights that would
            be kept now.
        checkpoints: written every `settings.checkpoint_every` steps and at the end; where it holds one already, the
            training goes on from there.
        cache: of encoded prompts.
        workers: the processes that train together.
        bank: of anchors, to take those that are known from and to put others into; without it they are computed at each
            step, or with `settings.draws` kept until the end.

    Raises:
        TrainingDiverged: if the loss or its gradient is not finite; the weights stay as they were before that step.
        ValueError: for latents of a wrong shape, an objective whose class pictures are missing, a probe that the
            settings need and that is missing, a checkpoint of another training, or a model, objective, adapter and
            prompts that do not go together.
    """
    settings = resolve(settings, denoiser)
    objective = settings.make_objective()
    settings.check_model(denoiser.prediction_type)
    if not isinstance(references, Dataset):
        _check_latents("references", references)
        references = Dataset.of_latents(references, concept)
    pairs = {pair for each in references.examples for pair in zip(each.subject_prompts, each.class_prompts)}
    check_combination(settings, adapter.config, sorted(pairs), references.caption_dropout)
    classes = None
    if objective.reads_class_pictures:
        if class_latents is None:
            raise ValueError(f"objective {objective.name!r} reads class pictures, but class_latents is None; pass them")
        _check_latents("class_latents", class_latents)
        own = class_latents.detach().to("cpu", torch.float32, copy=True)
        classes = Dataset([Example(row, (concept.class_prompt,), (concept.class_prompt,)) for row in own])
    if probe is None and (settings.keep == "best" or settings.stop_on_drift):
        raise ValueError("keep best and stop_on_drift read the drift probe, but there is none; set probe_every above 0")
    with _set_up(denoiser, settings):
        datasets = [references] if classes is None else [references, classes]
        cache = cache or Cache(denoiser)
        batches = Batches(denoiser, adapter, datasets, concept, settings, cache, workers, bank)
        batches.check_bank()
        run = _Run(batches, probe, checkpoints, tell, orders, answer)
        if checkpoints is not None:
            resume(run)
        try:
            run.loop()
        finally:
            run.average.apply()
        run.keep()
        return run.history


def one_pass(
    denoiser: Denoiser,
    datasets: list[Dataset],
    concept: Concept,
    settings: TrainSettings,
    cache: Cache,
    watching: AbstractContextManager,
) -> None:
    """Compute the gradient of the first pass of a training inside `watching`, and throw it away."""
    settings = resolve(settings, denoiser)
    with _set_up(denoiser, settings):
        run = _Run(Batches(denoiser, denoiser.adapter, datasets, concept, settings, cache, ALONE))
        for parameter in run.parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            with watching:
                run.pass_()
        finally:
            run.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _set_up(denoiser: Denoiser, settings: TrainSettings) -> Iterator[None]:
    """What holds while gradients are computed."""
    with ExitStack() as stack:
        # ComfyUI runs nodes in inference mode, where nothing can be trained.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(own_random_state(denoiser.device, settings.seed))
        if settings.gradient_checkpointing:
            stack.enter_context(checkpointed(denoiser.blocks))
        yield


class _Run:
    """One training: all that changes while it goes on is in its checkpoints."""

    def __init__(
        self,
        batches: Batches,
        probe: DriftProbe | None = None,
        checkpoints: Checkpoints | None = None,
        tell: Tell | None = None,
        orders: Orders | None = None,
        answer: Callable[[str, int], None] | None = None,
    ):
        self.batches, self.denoiser, self.adapter = batches, batches.denoiser, batches.adapter
        self.settings, self.workers = batches.settings, batches.workers
        self.tell, self.orders, self.answer = tell or _ignore, orders or Orders(), answer or _ignore
        self.objective, self.probe, self.checkpoints = self.settings.make_objective(), probe, checkpoints
        self.parameters = self.adapter.parameters()
        rates = self.settings.token_learning_rate, self.settings.norm_learning_rate
        self.optimizer = make_optimizer(self.adapter.parameter_groups(*rates), self.settings)
        self.schedule = make_schedule(self.optimizer, self.settings)
        self.average = AveragedWeights(self.parameters, self.settings.ema, self.optimizer)
        self.scaler = make_scaler(self.settings, self.denoiser)
        self.autocast_dtype = autocast_dtype(self.settings, self.denoiser)
        self.history, self.started = History(), time.perf_counter()
        self.candidates = Candidates(self.settings.keep)  # of the probes within the budget
        self.tally = torch.zeros(3, LEVELS, device=self.denoiser.device)

    @property
    def made(self) -> int:
        return len(self.history.losses)

    @property
    def steps(self) -> int:
        """How many are to be made, as far as is known."""
        return self.settings.steps + self.orders.more

    # --- the loop -----------------------------------------------------------------------------------------------

    def loop(self) -> None:
        settings, history = self.settings, self.history
        if self.probe is not None and not history.probes:
            self._measure()
        while self.orders.goes_on(self.made, settings.steps) and not history.over_budget:
            self._attend()
            ending = self.orders.ending
            history.cancelled, history.stopped = ending == "cancelled", ending == "stopped"
            if ending:
                break
            terms, tallied = self._optimize()
            distances = history.add(terms, tallied)
            history.seconds += time.perf_counter() - self.started
            self.started = time.perf_counter()
            self.tell(StepMade(self.made, self.steps, history.losses[-1], terms, history.seconds, distances))
            if self.probe is not None and (self.made % settings.probe_every == 0 or self.made == self.steps):
                self._measure()
            if settings.checkpoint_every and self.made % settings.checkpoint_every == 0:
                self._save()
        if self.probe is not None and history.probes[-1][0] != self.made:
            self._measure()
        if self.made and (settings.checkpoint_every and self.made % settings.checkpoint_every):
            self._save()
        self._attend()
        history.seconds += time.perf_counter() - self.started
        logger.info("trained %d of %d steps in %.1f s", self.made, self.steps, history.seconds)

    def _attend(self) -> None:
        """Answer the orders of the time since the last step, and wait while it is paused, which counts no time."""
        began = time.perf_counter()
        for _ in self.orders.gap(self.tell, "training") if self.made != self.steps else [None]:
            for what in self.orders.take():
                with self.average:
                    self.answer(what, self.made)
        self.started += time.perf_counter() - began

    def _optimize(self) -> tuple[dict[str, float], list[float]]:
        """One step of the optimizer; gives the weighted terms of the loss, and the tally of its predictions."""
        settings = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        for vectors in self.adapter.tokens.vectors.values() if self.adapter.tokens is not None else ():
            # Rows without a caption do not reach them, and all processes average the same gradients.
            vectors.grad = torch.zeros_like(vectors)
        sums: dict[str, Tensor] = {}
        self.tally.zero_()
        for _ in range(settings.accumulation):
            for name, term in self.pass_().items():
                sums[name] = sums.get(name, 0) + term
        self.workers.average([*sums.values(), self.tally, *(p.grad for p in self.parameters if p.grad is not None)])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip or math.inf)
        told = torch.cat([torch.stack([*sums.values(), norm]), self.tally.flatten()])
        *terms, norm = (told := told.tolist())[: len(sums) + 1]  # the step's one wait for the device
        self._check_finite("loss", sum(terms))
        fits = math.isfinite(norm)
        if not self.scaler.is_enabled():  # else the scaler leaves the step out and lowers its scale
            self._check_finite("gradient", norm)
        with self.average.whole():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if fits:
                self.schedule.step()
                self.average.update()
            elif self.scaler.get_scale() < LOWEST_SCALE:
                raise TrainingDiverged(
                    f"the gradient overflows fp16 at step {self.made + 1} of {self.steps}, even with the loss times "
                    f"{self.scaler.get_scale() / self.scaler.get_backoff_factor():g}; take a learning_rate below "
                    f"{settings.learning_rate:g}, or the model in bf16 or fp32"
                )
        return dict(zip(sums, terms, strict=True)), told[len(sums) + 1 :]

    def pass_(self) -> dict[str, Tensor]:
        """Add the gradient of one pass to the parameters'; gives its part of the terms of a step's loss."""
        sums: dict[str, Tensor] = {}
        for part in self.batches.parts():
            share = self.settings.accumulation * self.settings.batch_size / len(part.latents)
            with self.adapter.dropout(), self._autocast():
                terms = self.objective(part)
            self.scaler.scale(sum(terms.values()) / share).backward()
            self.tally += tally(part)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / share
        return sums

    def _autocast(self):
        dtype = self.autocast_dtype
        return torch.autocast(self.denoiser.device.type, dtype, enabled=dtype is not None)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {what} became {value} at step {self.made + 1} of {self.steps}; take a learning_rate "
                f"below {self.settings.learning_rate:g}, and pictures and latents without NaN"
            )

    # --- when to stop and what to keep --------------------------------------------------------------------------

    def _measure(self) -> None:
        """Measure the probe on the weights that would be kept now, and offer them as what to keep.

        Their score is the value of Eq. 5 on the probe, reconstruction + keep_w * drift, each a mean squared error in
        epsilon. Its points are fixed, so that unlike the training's loss it can be compared between steps.
        """
        settings = self.settings
        with self.average:
            result = self.probe.measure()
            self.history.probes.append((self.made, result))
            self.tell(Measured(self.made, result))
            if settings.stop_on_drift and result.drift > settings.stop_on_drift:
                if self.made == 0:
                    raise ValueError(
                        f"stop_on_drift is {settings.stop_on_drift:g}, but the model alone measures "
                        f"{result.drift:.4g}; take more than that"
                    )
                self.history.over_budget = True
                return
            if settings.keep == "best" or settings.stop_on_drift:
                self.candidates.offer(self.made, result.objective(settings.keep_w), self.adapter.state_dict)

    def keep(self) -> None:
        """Leave the adapter with the weights to keep; with `keep="last"`, over the budget, the last within it."""
        self.history.kept, chosen = self.made, self.candidates.kept
        if chosen is not None and (self.settings.keep == "best" or self.history.over_budget):
            self.adapter.load_state_dict(chosen["weights"])
            self.history.kept = chosen["step"]

    def _save(self) -> None:
        if self.checkpoints is not None and self.workers.is_first:
            self.checkpoints.save(self.made, state_of(self))


def _ignore(*_: Any) -> None:
    pass


def _check_latents(name: str, latents: Tensor) -> None:
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"{name} is {tuple(latents.shape)}, but it takes (N, C, h, w) with at least one picture")
