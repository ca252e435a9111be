"""What a training computes on: the rows of each pass, drawn from one generator, as steps of the method."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..concept import Concept
from ..data.cache import Cache
from ..data.dataset import Dataset, Rows
from ..data.digest import digest
from ..denoiser import Condition, Denoiser, PriorBatch, Step, Texts
from .bank import GB, Bank
from .noise_levels import level_at, min_snr_weights, sample_levels
from .parallel import Workers
from .precision import autocast_dtype
from .settings import TrainSettings

logger = logging.getLogger(__name__)

FILL, FILL_ROWS = 4, 16
"""Fixed draws whose anchors are computed at once: this many times the rows of a pass, as long as that is at most so
many rows. A pass without a graph takes less memory than that of a quarter of its rows with one."""


class Batches:
    """The passes of one training: what they are drawn from is in its checkpoints.

    Args:
        datasets: the references, and the class pictures of an objective that reads some.
        bank: of anchors; None to compute them in each pass, and those of fixed draws once.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapter: Adapter,
        datasets: list[Dataset],
        concept: Concept,
        settings: TrainSettings,
        cache: Cache,
        workers: Workers,
        bank: Bank | None = None,
    ):
        self.denoiser, self.adapter, self.settings, self.workers = denoiser, adapter, settings, workers
        self.datasets, self.concept = datasets, concept
        for dataset in datasets:
            dataset.begin()  # another training may have drawn from it
        self.bank = Bank(denoiser, limit=GB * settings.bank) if bank is None and settings.draws else bank
        self.generator = torch.Generator().manual_seed(settings.seed)
        objective = settings.make_objective()
        prompts = list(dict.fromkeys(prompt for dataset in datasets for prompt in dataset.prompts()))
        prompts += [""] if objective.reads_unconditional else []
        self.conditions = dict(zip(prompts, cache.conditions(prompts)))
        reads_pooled = objective.reads_pooled
        self.class_pooled = denoiser.encode_pooled([concept.class_prompt]) if reads_pooled else None
        rows = settings.micro_batch or settings.batch_size
        self._filled = min(settings.draws, max(rows, min(FILL * rows, FILL_ROWS)))

    def check_bank(self) -> None:
        """ValueError unless the bank takes the anchors of all fixed draws; a warning if they are more than is seen."""
        settings, references = self.settings, self.datasets[0]
        if not (settings.draws and settings.make_objective().reads_anchor):
            return
        dropped = {""} if references.caption_dropout else set()
        autocast, seen = autocast_dtype(settings, self.denoiser), settings.steps * settings.accumulation
        width = (autocast or self.denoiser.compute_dtype).itemsize
        seen *= settings.batch_size * self.workers.count
        variants = [(1 + (e.flipped is not None)) * len({*e.class_prompts, *dropped}) for e in references.examples]
        each = sum(n * width * e.latents.numel() for n, e in zip(variants, references.examples))
        total, limit = settings.draws * each, GB * settings.bank
        if total > limit:
            raise ValueError(
                f"draws is {settings.draws}, whose {settings.draws * sum(variants)} anchors take {total / GB:.2f} GB, "
                f"but bank is {settings.bank:g} GB; take draws {int(limit // each)} or less, or a larger bank"
            )
        if settings.draws * sum(variants) > seen:
            logger.warning(
                "draws %d make %d anchors, but the training sees %d rows; draws %d or 0 take less time",
                settings.draws, settings.draws * sum(variants), seen, seen // sum(variants),
            )  # fmt: skip

    def parts(self) -> Iterator[Step]:
        """The rows of a pass, drawn at once and computed in parts of `micro_batch` rows."""
        drawn, rows, mine, chosen = self._rows(self.datasets[0], self.settings.draws)
        classes = [self._rows(dataset) for dataset in self.datasets[1:]]
        masks = None if rows.masks is None else rows.masks[mine].to(self.denoiser.device)
        encode = partial(self._encoded, adapted=True)
        at_once = self.settings.micro_batch or self.settings.batch_size
        for first in range(0, self.settings.batch_size, at_once):
            part = slice(first, first + at_once)
            latents, noise, timesteps, weights = self._placed(drawn, part)
            prior = None
            for class_drawn, class_rows, share, _ in classes:
                prior = PriorBatch(*self._placed(class_drawn, part), encode(class_rows.class_prompts[share][part]))
            class_prompts = rows.class_prompts[mine][part]
            if self.bank is None:
                known = None
            elif chosen:
                known = partial(self._of_draws, drawn[0][part], chosen[mine][part])
            else:
                known = partial(self._of_pass, [tensor[part] for tensor in drawn])
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
                known,
            )

    def _rows(self, dataset: Dataset, draws: int = 0) -> tuple[list[Tensor], Rows, slice, list[int]]:
        """Latents, noise (B, C, h, w) and timesteps (B,) of this worker's share, on the CPU; then the rows of all
        workers, the share, and the fixed draws of all."""
        count = self.settings.batch_size * self.workers.count
        rows, mine, chosen = dataset.draw(count, self.generator), self.workers.share(count), []
        if draws:
            chosen = torch.randint(draws, (count,), generator=self.generator).tolist()
            levels, noise = self._fixed([digest(each) for each in rows.latents], chosen, rows.latents.shape[1:])
        else:
            levels = sample_levels(count, self.generator, self.settings)
            noise = torch.randn(rows.latents.shape, generator=self.generator)
        timesteps = self.denoiser.timesteps(levels[mine])
        return [rows.latents[mine], noise[mine], timesteps], rows, mine, chosen

    def _placed(self, drawn: Sequence[Tensor], part: slice) -> list[Tensor | None]:
        """Latents, noise, timesteps and weights of a part, where the network is."""
        latents, noise, timesteps = (tensor[part].to(self.denoiser.device) for tensor in drawn)
        weights = None
        if self.settings.min_snr:
            snr = self.denoiser.snr(timesteps)
            weights = min_snr_weights(snr, self.settings.min_snr, self.denoiser.prediction_type)
        return [latents, noise, timesteps, weights]

    def _encoded(self, prompts: Sequence[str], adapted: bool = False) -> list[Condition]:
        """A condition a prompt: the pretrained encoder's, or that of the adapter on it if there is one."""
        if not (adapted and self.adapter.config.trains_text):
            return [self.conditions[prompt] for prompt in prompts]
        different = list(dict.fromkeys(prompts))
        encoded = dict(zip(different, self.denoiser.encode_prompts(different, adapted=True)))
        return [encoded[prompt] for prompt in prompts]

    # --- anchors that are known -----------------------------------------------------------------------------------

    def _fixed(self, pictures: Sequence[str], chosen: Sequence[int], shape) -> tuple[Tensor, Tensor]:
        """Levels (B,) and noise (B, C, h, w) of these draws of pictures that are known by their digests.

        A picture's draws are its own, whatever the training's seed: draw k of N has a level of the k-th N-th part of
        the schedule (as it is sampled), so that few of them cover it.
        """
        shares, noise = [], []
        for picture, index in zip(pictures, chosen, strict=True):
            seed = hashlib.sha256(f"{picture} {index} of {self.settings.draws}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)
            within = torch.rand((), generator=generator, dtype=torch.float64)
            shares.append((index + within) / self.settings.draws)
            noise.append(torch.randn(shape, generator=generator))
        return level_at(torch.stack(shares), self.settings), torch.stack(noise)

    def _of_pass(self, drawn: list[Tensor], step: Step) -> Tensor:
        """The anchors of a pass, by all that it sees: what other rows are beside one changes its last bits."""
        return self.bank.anchors(step.class_conditions, drawn, step.pretrained)

    def _of_draws(self, latents: Tensor, chosen: Sequence[int], step: Step) -> Tensor:
        """The anchors of fixed draws, each from the group of its picture's draws that it is always computed with."""
        found, device = [], step.latents.device
        for row, index, condition in zip(latents, chosen, step.class_conditions, strict=True):
            group = range(index // self._filled * self._filled, self.settings.draws)[: self._filled]
            levels, noise = self._fixed([digest(row)] * len(group), group, row.shape)
            drawn = [row.expand_as(noise), noise, self.denoiser.timesteps(levels)]

            def compute(drawn=drawn, condition=condition) -> Tensor:
                inputs = (tensor.to(device) for tensor in drawn)
                return Step(self.denoiser, *inputs, (), [condition] * len(drawn[0])).pretrained()

            found.append(self.bank.anchors([condition] * len(group), drawn, compute)[index - group[0]])
        return torch.stack(found)
