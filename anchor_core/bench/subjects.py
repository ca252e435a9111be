"""A benchmark's subjects on any model: their references, their prompts, and the scores of pictures of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import shown
from ..data.folder import picture_files
from ..data.pictures import References, load_references, to_tensor
from ..evaluation.metrics import Encoders
from ..evaluation.picture_folders import class_only, read_prompt_file
from .config import Config, Source

Scored = dict[str, list[float | None]]
"""Score -> one value a picture; None for a picture that it does not say anything of."""


class Subject(Protocol):
    """One subject: what it is trained on, asked for, and measured by."""

    name: str
    class_word: str
    references: References

    def prompts(self, token: str) -> list[str]:
        """With the subject's word, or class-only with the empty one."""

    def score(self, pictures: Sequence[Tensor], asked: Sequence[int]) -> Scored:
        """Pictures (3, H, W) in [0, 1] of the prompts of these numbers."""


class SandboxSubject:
    """One of the embedded model's held-out subjects, scored by the sandbox's judge."""

    def __init__(self, name: str, judge):
        from ..sandbox import subjects

        self._own, self._judge = subjects.get(name), judge
        self.name, self.class_word = name, self._own.class_word
        pixels = [to_tensor(picture) for picture in self._own.references()]
        self.references = References(pixels, [f"{name} {number}" for number in range(len(pixels))])

    def prompts(self, token: str) -> list[str]:
        return self._own.prompts(token)

    def drawn(self, seed: int) -> list[Tensor]:
        """What each prompt asks for, drawn by code, (3, 64, 64) in [0, 1]."""
        return [to_tensor(picture) for picture in self._own.drawn(seed)]

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        pictures = self.references.stack()
        return self._judge.identity(pictures), self._judge.picture(pictures)

    def score(self, pictures: Sequence[Tensor], asked: Sequence[int]) -> Scored:
        """Identity, picture and text by the judge, and whether its reader finds what the prompt names."""
        drawn, prompts, scenes = torch.stack(list(pictures)), self.prompts(""), self._own.prompt_scenes()
        embedded, texts = self._judge.picture(drawn), self._judge.text([prompts[number] for number in asked])
        readings, wanted = self._judge.read(drawn), [scenes[number] for number in asked]

        def right(*names: str) -> list[float | None]:
            return [
                None if scene is None else float(all(getattr(scene, name) == reading[name] for name in names))
                for scene, reading in zip(wanted, readings)
            ]

        bare = [scene is not None and scene.accessory == "none" for scene in wanted]
        kind, equipped = right("accessory"), right("accessory", "accessory_colour")
        return {
            "subject_fidelity": mean_cosines(self._judge.identity(drawn), self._real[0]),
            "picture_similarity": mean_cosines(embedded, self._real[1]),
            "text_alignment": F.cosine_similarity(embedded, texts).tolist(),
            "shape": right("shape"),
            "background": right("background"),
            "accessory": [one if plain else both for plain, one, both in zip(bare, kind, equipped)],
        }


class FolderSubject:
    """A folder of pictures, as one of DreamBench's, scored by CLIP and DINO as far as there are some."""

    def __init__(self, name: str, source: Source, side: int, encoders: Encoders | None):
        told = read_prompt_file(source.prompts)
        self.name, self._encoders = name, encoders
        self.class_word = source.classes.get(name) or told.class_of(name)
        self.references = load_references(Path(source.references) / name, side)
        self._templates = [_slots(template) for template in told.templates(self.class_word)]

    def prompts(self, token: str) -> list[str]:
        return [class_only(template.format(token, self.class_word), "") for template in self._templates]

    @cached_property
    def _real(self) -> dict[str, Tensor]:
        return self._encoders.embed(self.references.pixels)

    def score(self, pictures: Sequence[Tensor], asked: Sequence[int]) -> Scored:
        if self._encoders is None:
            return {}
        embedded, scores = self._encoders.embed(pictures), {}
        for score, encoder in (("subject_fidelity", "dino"), ("picture_similarity", "clip")):
            if encoder in embedded:
                scores[score] = mean_cosines(embedded[encoder], self._real[encoder])
        if self._encoders.text is not None:
            prompts = self.prompts("")
            texts = self._encoders.text([prompts[number] for number in asked])
            scores["text_alignment"] = F.cosine_similarity(embedded["clip"], texts).tolist()
        return scores


def mean_cosines(pictures: Tensor, references: Tensor) -> list[float]:
    """Of each picture (N, D), the mean cosine to all references (M, D)."""
    return (F.normalize(pictures, dim=-1) @ F.normalize(references, dim=-1).T).mean(dim=1).tolist()


def _slots(template: str) -> str:
    """A prompt with {0} and {1}, of one that may have a {} for both instead; ValueError if it has neither."""
    if "{}" in template:
        template = template.replace("{}", "{0} {1}")
    if "{0}" not in template or "{1}" not in template:
        raise ValueError(
            f"prompts has {shown(template)!r}, but it takes {{}} where the subject's words go; put it there"
        )
    return template


def subject_names(config: Config) -> list[str]:
    """Those of the config, or every one of its references' folder that has pictures and a class.

    Raises:
        ValueError: for one that there is not, or without pictures or a class.
    """
    if config.in_sandbox:
        from ..sandbox import subjects

        return [subjects.get(name).name for name in config.subjects]
    folder, told = Path(config.source.references), read_prompt_file(config.source.prompts)
    if not folder.is_dir():
        raise ValueError(
            f"source.references is {shown(folder)!r}, which is no folder; give one with a folder a subject"
        )
    names = config.subjects or sorted(each.name for each in folder.iterdir() if each.is_dir())
    if not names:
        raise ValueError(
            f"source.references is {shown(folder)!r}, which holds no folder; give one with a folder a subject"
        )
    for name in names:
        picture_files(folder / name, "source.references")
        if name not in config.source.classes:
            told.class_of(name)
    return list(names)


def fingerprint(config: Config, subjects: Sequence[str]) -> dict[str, str]:
    """What tells the model and the references from others, wherever they lie: of names, sizes, and both ends of files.

    By subject for the references, so that subjects can be added.
    """
    if config.in_sandbox:
        from ..sandbox.model import WEIGHTS

        return {"model": _digest(_files(WEIGHTS))}
    source = config.source
    model = Path(config.model)
    found = {"model": _digest(_files(model) if model.is_dir() else [(model.name, model)])}
    for name in subjects:
        files = picture_files(Path(source.references) / name, "source.references")
        found[f"references of {name}"] = _digest([(file.name, file) for file in files])
    found["prompts"] = _digest([("prompts", Path(source.prompts))])
    return found


def _files(folder: Path) -> list[tuple[str, Path]]:
    """What a model in diffusers' layout is read from: a card beside its parts says nothing of what it draws."""
    kinds = (".safetensors", ".json", ".bin", ".txt")
    files = [*folder.glob("model_index.json"), *sorted(file for file in folder.glob("*/**/*") if file.suffix in kinds)]
    return [(file.relative_to(folder).as_posix(), file) for file in files]


def _digest(files: Sequence[tuple[str, Path]], end: int = 2**16) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(end))
            opened.seek(max(0, size - end))
            digest.update(opened.read(end))
    return digest.hexdigest()[:32]
