"""One subject and seed on a model: what every row of a benchmark shares, and how a row is trained, sampled, scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.embedding_file import adjust_embedding
from ..adapters.tokens import from_embedding, to_embedding
from ..backends.diffusers.adjust import encode_adjusted, word_rows
from ..backends.diffusers.denoiser import DiffusersDenoiser
from ..branches import CLASS, NULL, SUBJECT
from ..concept import Concept
from ..data.cache import Cache
from ..data.pictures import as_picture, read_picture, to_tensor
from ..data.prepare import ClassPictures, Material, prepare
from ..drift import DriftProbe, ProbeResult
from ..training.bank import Bank
from ..training.events import Event
from ..training.history import History
from ..training.run import fit
from ..training.saving import Files
from ..training.settings import DataSettings
from ..writing import whole
from .config import Config
from .rows import VECTORS, Sampling, Training
from .subjects import Scored, Subject

Scores = dict[str, float]


class Case:
    """A subject and a seed: pictures, probes and sampling noise are made once, when a row first needs them.

    Args:
        folder: where class pictures and latents are kept for other processes; None for nowhere.
    """

    def __init__(
        self, denoiser: DiffusersDenoiser, subject: Subject, seed: int, config: Config, folder: Path | None = None
    ):
        self.denoiser, self.subject, self.seed, self.config = denoiser, subject, seed, config
        self.concept = Concept.from_words(config.token, subject.class_word, config.template)
        self.cache = Cache(denoiser, folder)
        self._materials: dict[tuple, Material] = {}
        side = subject.references.pixels[0].shape[-1]
        self.shape = denoiser.latent_shape(side, side)

    def material(self, training: Training) -> Material:
        """What a training sees; the probe is that of all."""
        reads = training.settings.make_objective().reads_class_pictures
        key = (training.class_pictures if reads else 0, training.data)
        if key not in self._materials:
            self._materials[key] = self._prepare(*key)
        return self._materials[key]

    def _prepare(self, class_pictures: int, data: DataSettings) -> Material:
        made = prepare(
            self.denoiser, self.subject.references, self.concept, seed=self.seed, cache=self.cache, probe=None,
            class_pictures=self._class_pictures(class_pictures) if class_pictures else None,
            **data.build,
        )  # fmt: skip
        return replace(made, probe=self._probe_of(made.latents))

    def _class_pictures(self, count: int) -> ClassPictures:
        drawing = self.config.sampling
        sampling = {"steps": drawing.steps, "guidance": drawing.guidance}
        return ClassPictures(count, folder=self.cache.folder, sampling=sampling)

    def _probe_of(self, latents: Tensor) -> DriftProbe:
        if self._probe is None:
            probe = self.config.probe
            options = {"timesteps": probe.timesteps, "noises": probe.noises, "seed": self.seed}
            self._probe = DriftProbe(self.denoiser, latents, self.concept, **options)
        return self._probe

    _probe: DriftProbe | None = None

    @cached_property
    def probe(self) -> DriftProbe:
        """On the references' latents."""
        return self._probe_of(torch.stack(self.cache.latents(self.subject.references.pixels)))

    @cached_property
    def class_probe(self) -> DriftProbe | None:
        """On class pictures that the pretrained model made."""
        probe = self.config.probe
        if not probe.class_pictures:
            return None
        # Its own, not those of an objective: a cell must not depend on what was trained before it.
        pictures = self._class_pictures(probe.class_pictures)
        latents = pictures.latents(self.denoiser, self.concept, self.shape, self.seed, lambda: None)
        options = {"timesteps": probe.timesteps, "noises": probe.noises, "seed": self.seed, "latents_are": "class"}
        return DriftProbe(self.denoiser, latents, self.concept, **options)

    @cached_property
    def bank(self) -> Bank:
        """Every row with this seed sees the same draws, and a bank changes no bit."""
        return Bank(self.denoiser)

    # Rows

    def train(self, training: Training, tell: Callable[[Event], None], files: Files | None = None) -> History:
        """Train an adapter, which stays attached; save it in `files`."""
        self.denoiser.attach(training.for_class(self.subject.class_word), seed=self.seed)
        settings = replace(training.settings, seed=self.seed)
        return fit(self.denoiser, self.material(training), settings, files=files, tell=tell, bank=self.bank).history

    def drifts(self) -> Scores:
        """Of the adapter that is attached."""
        found = {"drift": self.probe.drift()}
        if self.class_probe is not None:
            found["drift_class"] = self.class_probe.drift()
        return found

    def score(
        self, row: Sampling | None = None, token: str | None = None, folder: Path | None = None
    ) -> tuple[Scores, Scored]:
        """Sample every prompt and score the pictures: the means, and the values one a picture, prompt by prompt.

        Args:
            row: how the adapter is sampled; None for plainly.
            token: in place of the config's; empty for the class.
            folder: where the pictures are kept, as `compare` reads them; those that it holds are not made again.
        """
        found: Scored = {}
        for asked, pictures in self.pictures(row, self.config.token if token is None else token, folder):
            for name, values in self.subject.score(pictures, asked).items():
                found.setdefault(name, []).extend(values)
        return means(found), found

    @torch.no_grad()
    def oracle(self, folder: Path | None = None) -> tuple[Scores, Scored]:
        """Scores of what the prompts ask for, drawn by code, encoded and decoded, one picture a prompt."""
        drawn = torch.stack(self.subject.drawn(self.seed)).to(self.denoiser.device)
        decoded = self.denoiser.decode_latents(self.denoiser.encode_images(drawn)).cpu()
        files = [None if folder is None else folder / f"{prompt:02}_0.png" for prompt in range(len(decoded))]
        found = self.subject.score(list(map(_kept, decoded, files)), range(len(decoded)))
        return means(found), found

    @torch.no_grad()
    def pictures(
        self, row: Sampling | None, token: str, folder: Path | None = None
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """The pictures in batches, each batch with the numbers of its prompts."""
        drawing, prompts = self.config.sampling, self.subject.prompts(token)
        every = [(prompt, number) for prompt in range(len(prompts)) for number in range(drawing.count)]
        generator = torch.Generator().manual_seed(10_000 + self.seed)
        noise = torch.randn((len(every), *self.shape), generator=generator).to(self.denoiser.device)
        sampler = _Sampler(self, row, prompts, self.subject.prompts(""))
        for start in range(0, len(every), drawing.batch):
            part = every[start : start + drawing.batch]
            files = [None if folder is None else folder / f"{prompt:02}_{number}.png" for prompt, number in part]
            held = [None if file is None or not file.is_file() else read_picture(file) for file in files]
            if any(each is None for each in held):
                drawn = sampler([prompt for prompt, _ in part], noise[start : start + len(part)])
                held = [_kept(new, file) if old is None else old for new, old, file in zip(drawn, held, files)]
            yield [prompt for prompt, _ in part], held

    def with_vectors(self, row: Sampling, folder: Path | None) -> tuple[Scores, Scored]:
        """Scores with the token's vectors adjusted, which are then as they were; the adjustment changes the drift."""
        tokens, word = self.denoiser.adapter.tokens, self.subject.class_word
        before = tokens.state_dict()
        rows = word_rows(self.denoiser, word)
        adjusted = from_embedding(
            adjust_embedding(to_embedding(tokens), word, rows, row.adjustment), self.denoiser.text_encoders
        )
        tokens.load_state_dict({f"{prefix}:tokens": each for prefix, each in adjusted.items()})
        try:
            scores, by_picture = self.score(row, folder=folder)
            return {**scores, **self.drifts()}, by_picture
        finally:
            tokens.load_state_dict(before)


def means(scored: Scored) -> Scores:
    """Of each score, over the pictures that have it."""
    told = {name: [value for value in values if value is not None] for name, values in scored.items()}
    return {name: sum(values) / len(values) for name, values in told.items() if values}


def _kept(picture: Tensor, file: Path | None) -> Tensor:
    """The picture as its file has it, so that a second start scores what the first one did; without one, itself."""
    if file is None:
        return picture
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(as_picture(picture))
    with whole(file) as part:
        image.save(part, format="PNG")
    return to_tensor(image)


class _Sampler:
    """Samples prompts by a row's rule or adjustment; each prompt is encoded once."""

    def __init__(self, case: Case, row: Sampling | None, prompts: Sequence[str], classes: Sequence[str]):
        self.case, self.row, self.prompts, self.classes = case, row, prompts, classes
        self._encoded: dict[int, dict] = {}

    def __call__(self, asked: Sequence[int], noise: Tensor) -> list[Tensor]:
        denoiser, drawing, row = self.case.denoiser, self.case.config.sampling, self.row
        rule, strength = (None, 1.0) if row is None else (row.rule, row.strength)
        with nullcontext() if denoiser.adapter is None else denoiser.adapter.scaled(strength):
            each = [self._conditions(prompt) for prompt in asked]
            encoded = {branch: [conditions[branch][0] for conditions in each] for branch in each[0]}
            options = {"steps": drawing.steps, "guidance": drawing.guidance, **({} if row is None else row.own)}
            latents = denoiser.sample(
                encoded[SUBJECT], encoded[NULL][0], noise, rule=rule, class_=encoded.get(CLASS), encoded=encoded,
                **options,
            )  # fmt: skip
            return list(denoiser.decode_latents(latents).cpu())

    def _conditions(self, prompt: int) -> dict[Any, list]:
        if prompt not in self._encoded:
            denoiser, row = self.case.denoiser, self.row
            texts, adjusted = (self.prompts[prompt], self.classes[prompt]), None
            if row is not None and row.adjust not in ("", VECTORS):
                adjusted = partial(encode_adjusted, denoiser, *texts, row.adjustment, align=row.adjust)
            rule = None if row is None else row.rule
            self._encoded[prompt] = denoiser.encode_branches(rule, *texts, encode_subject=adjusted)
        return self._encoded[prompt]


def point(step: int, result: ProbeResult, w: float) -> dict[str, float]:
    """A measurement of a training, as its cell has it."""
    names = ("reconstruction", "drift", "class_drift", "subject")
    return {"step": step, "objective": result.objective(w), **{name: getattr(result, name) for name in names}}
