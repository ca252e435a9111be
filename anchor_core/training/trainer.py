"""The training loop: an objective, an adapter, a history, and checkpoints to go on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..concept import Concept
from ..data.cache import Cache
from ..data.dataset import Dataset, Example
from ..denoiser import Condition, Denoiser, PriorBatch, Step, Texts
from ..devices import own_random_state
from ..drift import LEVELS, DriftProbe, tally
from .checkpoint import Checkpoints
from .events import Measured, PhaseBegun, StepMade, Tell
from .gradient_checkpointing import checkpointed
from .history import History
from .keeping import Candidates
from .methods import check_combination
from .noise_levels import min_snr_weights, sample_levels
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
        run = _Run(denoiser, adapter, datasets, concept, settings, probe, checkpoints, cache, workers)
        run.tell, run.orders, run.answer = tell or (lambda *_: None), orders or Orders(), answer or (lambda *_: None)
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
        run = _Run(denoiser, denoiser.adapter, datasets, concept, settings, None, None, cache, ALONE)
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
        denoiser: Denoiser,
        adapter: Adapter,
        datasets: list[Dataset],
        concept: Concept,
        settings: TrainSettings,
        probe: DriftProbe | None,
        checkpoints: Checkpoints | None,
        cache: Cache,
        workers: Workers,
    ):
        self.denoiser, self.adapter, self.settings, self.workers = denoiser, adapter, settings, workers
        self.objective, self.probe, self.checkpoints = settings.make_objective(), probe, checkpoints
        self.datasets, self.concept = datasets, concept
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = adapter.parameters()
        groups = adapter.parameter_groups(settings.token_learning_rate, settings.norm_learning_rate)
        self.optimizer = make_optimizer(groups, settings)
        self.schedule = make_schedule(self.optimizer, settings)
        self.average = AveragedWeights(self.parameters, settings.ema, self.optimizer)
        self.scaler = make_scaler(settings, denoiser)
        self.autocast_dtype = autocast_dtype(settings, denoiser)
        self.history, self.started = History(), time.perf_counter()
        self.candidates = Candidates(settings.keep)  # of the probes within the budget
        self.tally = torch.zeros(3, LEVELS, device=denoiser.device)
        prompts = list(dict.fromkeys(prompt for dataset in datasets for prompt in dataset.prompts()))
        prompts += [""] if self.objective.reads_unconditional else []
        self.conditions = dict(zip(prompts, cache.conditions(prompts)))
        reads_pooled = self.objective.reads_pooled
        self.class_pooled = denoiser.encode_pooled([concept.class_prompt]) if reads_pooled else None

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
        began, paused = time.perf_counter(), False
        while True:
            for what in self.orders.take():
                with self.average:
                    self.answer(what, self.made)
            if not self.orders.paused or self.made == self.steps:
                break
            if not paused:
                self.tell(PhaseBegun("paused"))
            paused = True
            self.orders.wait()
        if paused:
            self.tell(PhaseBegun("training"))
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
        if not self.scaler.is_enabled():  # else the scaler leaves the step out and lowers its scale
            self._check_finite("gradient", norm)
        scale = self.scaler.get_scale()
        with self.average.whole():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() >= scale:
                self.schedule.step()
                self.average.update()
            elif self.scaler.get_scale() < LOWEST_SCALE:
                raise TrainingDiverged(
                    f"the gradient overflows fp16 at step {self.made + 1} of {self.steps}, even with the loss times "
                    f"{scale:g}; take a learning_rate below {settings.learning_rate:g}, or the model in bf16 or fp32"
                )
        return dict(zip(sums, terms, strict=True)), told[len(sums) + 1 :]

    def pass_(self) -> dict[str, Tensor]:
        """Add the gradient of one pass to the parameters'; gives its part of the terms of a step's loss."""
        sums: dict[str, Tensor] = {}
        for part in self._draw():
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

    def _draw(self) -> Iterator[Step]:
        """The rows of a pass, drawn at once and computed in parts of `micro_batch` rows."""
        drawn, rows, mine = self._rows(self.datasets[0])
        classes = [self._rows(dataset) for dataset in self.datasets[1:]]
        masks = None if rows.masks is None else rows.masks[mine].to(drawn[0])
        encode = partial(self._encoded, adapted=True)
        at_once = self.settings.micro_batch or self.settings.batch_size
        for first in range(0, self.settings.batch_size, at_once):
            part = slice(first, first + at_once)
            latents, noise, timesteps, weights = _part_of(drawn, part)
            prior = None
            for class_drawn, class_rows, share in classes:
                prior = PriorBatch(*_part_of(class_drawn, part), encode(class_rows.class_prompts[share][part]))
            class_prompts = rows.class_prompts[mine][part]
            yield Step(
                self.denoiser,
                latents,
                noise,
                timesteps,
                encode(rows.subject_prompts[mine][part]),
                self._encoded(class_prompts),
                prior,
                weights,
                None if masks is None else masks[part],
                Texts(class_prompts, encode, self.concept.subject_prompt, self.class_pooled),
            )

    def _rows(self, dataset: Dataset):
        """Latents, noise (B, C, h, w), timesteps (B,), weights (B,) or None: of all workers, then this one's share."""
        count, device = self.settings.batch_size * self.workers.count, self.denoiser.device
        rows = dataset.draw(count, self.generator)
        levels = sample_levels(count, self.generator, self.settings)
        noise = torch.randn(rows.latents.shape, generator=self.generator)
        mine = self.workers.share(count)
        timesteps = self.denoiser.timesteps(levels[mine]).to(device)
        weights = None
        if self.settings.min_snr:
            snr = self.denoiser.snr(timesteps)
            weights = min_snr_weights(snr, self.settings.min_snr, self.denoiser.prediction_type)
        return (rows.latents[mine].to(device), noise[mine].to(device), timesteps, weights), rows, mine

    def _encoded(self, prompts: Sequence[str], adapted: bool = False) -> list[Condition]:
        """A condition a prompt: the pretrained encoder's, or that of the adapter on it if there is one."""
        if not (adapted and self.adapter.config.trains_text):
            return [self.conditions[prompt] for prompt in prompts]
        different = list(dict.fromkeys(prompts))
        encoded = dict(zip(different, self.denoiser.encode_prompts(different, adapted=True)))
        return [encoded[prompt] for prompt in prompts]

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


def _part_of(drawn: Sequence[Tensor | None], part: slice) -> list[Tensor | None]:
    return [None if tensor is None else tensor[part] for tensor in drawn]


def _check_latents(name: str, latents: Tensor) -> None:
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"{name} is {tuple(latents.shape)}, but it takes (N, C, h, w) with at least one picture")
