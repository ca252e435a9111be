"""One subject of the sandbox, trained by one method and scored: what the demo and the tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.config import AdapterConfig
from ..backends.diffusers.adjust import encode_adjusted
from ..backends.diffusers.denoiser import DiffusersDenoiser
from ..concept import Concept
from ..data.prepare import ClassPictures, prepare
from ..drift import DriftProbe
from ..embeddings import Adjustment
from ..evaluation.metrics import mean_pairwise_cosine, text_alignment
from ..sandbox.judge import Judge
from ..sandbox.subjects import Subject
from ..training.bank import Bank
from ..training.events import Event, Tell
from ..training.history import History
from ..training.run import fit
from ..training.saving import Files
from ..training.settings import TrainSettings

TOKEN = "sks"
TUNING_SUBJECTS = ("rosie", "ziggy")
"""The settings below were chosen on these two; the tables leave them out."""
TABLE_SUBJECTS = ("pip", "momo", "bolt", "luna", "dot", "tri", "loop", "plus")

SETTINGS = TrainSettings(steps=100, learning_rate=1e-3, token_learning_rate=1e-2, batch_size=4, probe_every=25)
ADAPTER = AdapterConfig(rank=8, layers="all_linear_conv", vectors=1)
CLASS_PICTURES = 24
SAMPLING = {"steps": 20, "guidance": 4.0}


@dataclass(frozen=True)
class Method:
    """A row of a table: an objective with its options."""

    name: str
    objective: str
    w: float = 0.0
    anchor: str = "pretrained"

    def settings(self, base: TrainSettings) -> TrainSettings:
        return replace(base, objective=self.objective, w=self.w, anchor=self.anchor)


DREAMBOOTH = Method("dreambooth", "reconstruction")
PRIOR_PRESERVATION = Method("prior_preservation", "prior_preservation")
ANCHORED = Method("anchored", "anchor", w=0.5)


@dataclass
class Scores:
    """How an adapter does on the subject's 25 prompts.

    Attributes:
        subject_fidelity: identity cosine to the references (the role of DINO).
        picture_similarity: picture cosine to the references (the role of CLIP-I).
        text_alignment: cosine to the class-only prompt (the role of CLIP-T).
        shape, background, accessory: share of the 20 attribute prompts on which the reader agrees.
        drift: Fig. 8b on the references' latents; drift_class: the same on class pictures' latents.
    """

    subject_fidelity: float
    picture_similarity: float
    text_alignment: float
    shape: float
    background: float
    accessory: float
    drift: float
    drift_class: float


class Personalisation:
    """A subject on a model: its latents, class pictures, probes and fixed sampling noise, made once for all methods."""

    def __init__(self, denoiser: DiffusersDenoiser, judge: Judge, subject: Subject, seed: int = 0):
        self.denoiser, self.judge, self.subject, self.seed = denoiser, judge, subject, seed
        self.concept = Concept(f"a photo of a {TOKEN} {subject.class_word}", f"a photo of a {subject.class_word}")
        self.references = torch.stack([_pixels(picture) for picture in subject.references()])  # (N, 3, 64, 64)
        self.latents = denoiser.encode_images(self.references)
        self.shape = tuple(self.latents.shape[1:])
        self.material = prepare(
            denoiser, self.latents, self.concept, seed=seed, probe={"noises": 2, "seed": seed},
            class_pictures=ClassPictures(CLASS_PICTURES, sampling=SAMPLING),
        )  # fmt: skip
        self.bank = Bank(denoiser)  # every method with this seed sees the same draws
        self.class_latents, self.probe = self.material.class_latents, self.material.probe
        self.class_probe = DriftProbe(
            denoiser, self.class_latents[:6], self.concept, noises=2, seed=seed, latents_are="class"
        )

    def train(
        self,
        method: Method,
        settings: TrainSettings = SETTINGS,
        adapter: AdapterConfig = ADAPTER,
        *,
        at: Iterable[int] = (),
        files: Files | None = None,
        tell: Tell = lambda event: None,
        on_scores: Callable[[int, Scores], None] | None = None,
    ) -> History:
        """Train `method`; the adapter stays attached. Save it in `files`. At the step counts `at`, score and pass
        on to `on_scores`."""
        at = set(at)

        def after(event: Event) -> None:
            tell(event)
            if event.event == "step" and event.step in at and on_scores is not None:
                on_scores(event.step, self.score(self.sample()))

        return self.fit(method.settings(settings), adapter, after, files)

    def fit(
        self,
        settings: TrainSettings,
        adapter: AdapterConfig,
        tell: Tell = lambda event: None,
        files: Files | None = None,
    ) -> History:
        """Train an adapter with this seed; it stays attached."""
        self.denoiser.attach(adapter, seed=self.seed)
        settings = replace(settings, seed=self.seed)
        return fit(self.denoiser, self.material, settings, files=files, tell=tell, bank=self.bank).history

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str] | None = None,
        *,
        adjust: Mapping[str, Any] | None = None,
        align: str = "index",
        **options: Any,
    ) -> Tensor:
        """Pictures (25, 3, 64, 64) in [0, 1], one a prompt, from noise that depends on the seed alone.

        Args:
            adjust: options of the `Adjustment` of the prompts to their class prompts, positions compared by `align`.
            options: of the denoiser's `sample`, in place of `SAMPLING`'s; a `rule` gets the class prompts too.
        """
        prompts = self.subject.prompts(TOKEN) if prompts is None else prompts
        generator = torch.Generator().manual_seed(10_000 + self.seed)
        noise = torch.randn((len(prompts), *self.shape), generator=generator)
        adapter = self.denoiser.adapter
        encode = partial(self.denoiser.encode_prompts, adapted=adapter is not None and adapter.config.trains_text)
        if "rule" in options:
            options["class_"] = encode(self.subject.prompts(""))
        (negative,) = encode([""])
        if adjust is None:
            conditions = encode(prompts)
        else:
            pairs, how = zip(prompts, self.subject.prompts("")), Adjustment(**adjust)
            conditions = [encode_adjusted(self.denoiser, *pair, how, align=align) for pair in pairs]
        latents = self.denoiser.sample(conditions, negative, noise, **{**SAMPLING, **options})
        return self.denoiser.decode_latents(latents)

    def drifts(self) -> dict[str, float]:
        """`drift` and `drift_class` of the adapter that is attached."""
        return {"drift": self.probe.measure().drift, "drift_class": self.class_probe.measure().drift}

    def score(self, pictures: Tensor, drifts: Mapping[str, float] | None = None) -> Scores:
        """Score the pictures of `sample()`, and the adapter that is attached where its drifts are not given."""
        judge, subject = self.judge, self.subject
        asked = [(scene, reading) for scene, reading in zip(subject.prompt_scenes(), judge.read(pictures)) if scene]

        def right(*names: str) -> float:
            return float(np.mean([all(getattr(scene, n) == reading[n] for n in names) for scene, reading in asked]))

        equipped = [
            scene.accessory == reading["accessory"]
            and (scene.accessory == "none" or scene.accessory_colour == reading["accessory_colour"])
            for scene, reading in asked
        ]
        return Scores(
            subject_fidelity=mean_pairwise_cosine(judge.identity(pictures), judge.identity(self.references)),
            picture_similarity=mean_pairwise_cosine(judge.picture(pictures), judge.picture(self.references)),
            text_alignment=text_alignment(judge.picture(pictures), judge.text(subject.prompts(""))),
            shape=right("shape"),
            background=right("background"),
            accessory=float(np.mean(equipped)),
            **(self.drifts() if drifts is None else drifts),
        )


def _pixels(picture) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0).float() / 255
