"""The sandbox's judge: encoders in the roles of CLIP and DINO, and exact attribute readers.

They are trained on pictures of the world apart from the generator (other pictures, other weights), a third of them with
unusual looks so that they stay reliable on personalised subjects, blurred and made noisy so that they stay reliable on
generated ones. The subjects' own looks are never among them.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import model, subjects, tokenizer, world
from .captions import caption
from .stage import Stage, autocast
from .towers import Contrast, PictureTower, as_tensor, contrastive_stage

FOLDER = model.WEIGHTS / "judge"

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "pattern": world.PATTERNS,
    "outline": world.OUTLINES,
    "background": tuple(world.BACKGROUNDS),
    "accessory": world.ACCESSORIES,
    "accessory_colour": world.ACCESSORY_COLOURS,
}
_OF_THE_LOOK = ("colour", "pattern", "outline")
_CHANNELS = (24, 32, 64, 96)
_TEXT = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}


class Readers(nn.Module):
    """One classifier for each attribute over a shared tower: (B, 3, 64, 64) to logits (B, values) by attribute."""

    def __init__(self):
        super().__init__()
        self.tower = PictureTower(width=192, channels=_CHANNELS)
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.silu(self.tower.head(self.tower.features(x)))
        return {name: head(features) for name, head in self.heads.items()}


def _text_encoder(clip_tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
        max_position_embeddings=77,
        **_TEXT,
    )
    return CLIPTextModel(config)


class _Parts(nn.Module):
    def __init__(self, clip_tokenizer):
        super().__init__()
        self.readers = Readers()
        self.identity = PictureTower(width=128, channels=_CHANNELS)
        self.text = _text_encoder(clip_tokenizer)
        self.contrast = Contrast(_TEXT["hidden_size"], channels=_CHANNELS)


class Judge:
    """Scores pictures of the world.

    Pictures are float tensors (B, 3, H, W) in [0, 1]; embeddings are unit vectors (B, 128).
    """

    def __init__(self, folder: Path = FOLDER):
        from safetensors.torch import load_file

        self.folder = folder
        self.tokenizer = tokenizer.load(folder.parent / "tokenizer")
        parts = _Parts(self.tokenizer)
        # transformers has named what is in a text tower `text_model...` and without it, by version.
        text = "text.text_model." if hasattr(parts.text, "text_model") else "text."
        held = load_file(folder / "judge.safetensors")
        parts.load_state_dict({re.sub(r"^text\.(text_model\.)?", text, k): v.float() for k, v in held.items()})
        self._parts = parts.eval().requires_grad_(False)

    @staticmethod
    def _prepared(pictures: Tensor) -> Tensor:
        if pictures.shape[-2:] != (model.PICTURE_SIZE,) * 2:
            pictures = F.interpolate(pictures, (model.PICTURE_SIZE,) * 2, mode="area")
        return pictures.float() * 2 - 1

    @torch.no_grad()
    def identity(self, pictures: Tensor) -> Tensor:
        """Who is in the picture, whatever surrounds it: the role of DINO."""
        return self._parts.identity(self._prepared(pictures))

    @torch.no_grad()
    def picture(self, pictures: Tensor) -> Tensor:
        """Picture side of the contrastive pair: the role of CLIP-I."""
        return self._parts.contrast.pictures(self._prepared(pictures))

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Text side of the contrastive pair: the role of CLIP-T. Prompts name the class only, not the rare token."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        pooled = self._parts.text(input_ids=tokens.input_ids).pooler_output
        return F.normalize(self._parts.contrast.head(pooled), dim=-1)

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        """The attributes of every picture, by name."""
        logits = self._parts.readers(self._prepared(pictures))
        best = {name: values.argmax(1).tolist() for name, values in logits.items()}
        return [{name: ATTRIBUTES[name][best[name][i]] for name in ATTRIBUTES} for i in range(len(pictures))]

    @cached_property
    def card(self) -> dict:
        """The judge's own accuracies and calibration, as written when it was trained."""
        return json.loads((self.folder / "judge.json").read_text())


# --- training -------------------------------------------------------------------------------------------------------


def _with_look(scene: world.Scene, rng: random.Random) -> world.Scene:
    return replace(scene, paint=subjects.random_look(rng))


def _scenes(count: int, seed: int, looks: float) -> list[world.Scene]:
    rng = random.Random(f"judge {seed}")
    drawn = []
    for _ in range(count):
        scene = world.sample_scene(rng)
        drawn.append(_with_look(scene, rng) if rng.random() < looks else scene)
    return drawn


def _individuals(count: int, views: int, seed: int) -> list[list[world.Scene]]:
    """`views` scenes of each individual: the same shape and paint, everything else different."""
    rng = random.Random(f"individuals {seed}")
    result = []
    for _ in range(count):
        first = world.sample_scene(rng)
        paint = subjects.random_look(rng) if rng.random() < 0.75 else world.ordinary_paint(first)
        scenes = []
        while len(scenes) < views:
            scene = replace(world.sample_scene(rng), shape=first.shape, paint=paint)
            if world.is_visible(scene):
                scenes.append(scene)
        result.append(scenes)
    return result


def _array(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.draw(scene))


def _drawn(scenes: list[world.Scene]) -> np.ndarray:
    """uint8 (N, 64, 64, 3)."""
    return np.stack([_array(scene) for scene in scenes])


def weathered(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the batch blurred, all of it a little noisy, so that a judge does not rely on crisp edges."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.from_numpy(rng.uniform(-0.6, 0.9, (len(x), 1, 1, 1)).clip(0).astype(np.float32)).to(x)
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x) * float(rng.uniform(0, 0.06))
    return torch.lerp(x, blurred, amount) + noise


def train(work: Path, pictures: int = 20000, individuals: int = 5000, steps: int = 700, device: str = "cpu") -> None:
    """Train the three judges; resumable like pretraining. The tokenizer of the work folder must exist."""
    where = torch.device(device)
    torch.manual_seed(101)
    scenes = _scenes(pictures, 1, looks=0.35)
    path = work / "judge_pictures.npy"
    if not path.exists():
        np.save(path, _drawn(scenes))
    drawn = np.load(path, mmap_mode="r")
    clip_tokenizer = tokenizer.load(work / "tokenizer")
    parts = _Parts(clip_tokenizer).to(where)
    _train_readers(Stage(work, "judge-readers", {"readers": parts.readers}, 1e-3, steps), parts.readers, drawn, scenes)
    _train_identity(
        Stage(work, "judge-identity", {"identity": parts.identity}, 1e-3, steps), parts.identity, work, individuals
    )
    nn.init.normal_(parts.text.get_input_embeddings().weight, 0, 0.1)
    stage = Stage(work, "judge-text", {"text": parts.text, "contrast": parts.contrast}, 1e-3, steps, decay=0.0)
    rng = random.Random("judge captions")
    captions = [[caption(scene, rng, rare=0.05) for _ in range(3)] for scene in scenes]
    contrastive_stage(stage, parts.text, parts.contrast, clip_tokenizer, drawn, captions, 96, weathered)


def _train_readers(stage: Stage, readers: Readers, drawn: np.ndarray, scenes: list[world.Scene]) -> None:
    device = next(readers.parameters()).device
    labels = {k: torch.tensor([v.index(getattr(s, k)) for s in scenes]) for k, v in ATTRIBUTES.items()}
    ordinary = torch.tensor([s.paint is None for s in scenes])
    equipped = torch.tensor([s.accessory != "none" for s in scenes])
    for rng in stage:
        index = np.sort(rng.choice(len(drawn), 96, replace=False))
        x = weathered(as_tensor(drawn[index]).to(device), rng)
        rows = torch.from_numpy(index)
        with autocast(device):
            logits = readers(x)
        losses = []
        for name, values in logits.items():
            losses.append(F.cross_entropy(values.float(), labels[name][rows].to(device), reduction="none"))
            if name in _OF_THE_LOOK:
                losses[-1] = losses[-1][ordinary[rows].to(device)]
            elif name == "accessory_colour":
                losses[-1] = losses[-1][equipped[rows].to(device)]
        stage.descend(sum(loss.mean() for loss in losses))


def _train_identity(stage: Stage, tower: PictureTower, work: Path, count: int) -> None:
    """Two views of one individual are each other's match among all others of the batch."""
    device = next(tower.parameters()).device
    path = work / "judge_individuals.npy"
    if not path.exists():
        np.save(path, np.stack([_drawn(views) for views in _individuals(count, 3, 1)]))
    drawn = np.load(path, mmap_mode="r")
    labels = torch.arange(64, device=device)
    for rng in stage:
        index = np.sort(rng.choice(len(drawn), 64, replace=False))
        views = rng.permuted(np.tile(np.arange(3), (64, 1)), axis=1)[:, :2]
        x = np.concatenate([drawn[index, views[:, 0]], drawn[index, views[:, 1]]])
        with autocast(device):
            embedded = tower(weathered(as_tensor(x).to(device), rng))
        logits = 12.0 * embedded[:64] @ embedded[64:].T
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        stage.descend(loss, accuracy=(logits.argmax(1) == labels).float().mean().item())


def assemble(work: Path, folder: Path) -> None:
    """Write `judge.safetensors` (float16) and `judge.json` with accuracies and calibration on fresh drawings."""
    from safetensors.torch import save_file

    parts = _Parts(tokenizer.load(work / "tokenizer"))
    for stage, names in (("readers", ("readers",)), ("identity", ("identity",)), ("text", ("text", "contrast"))):
        modules = torch.load(work / f"judge-{stage}.pt", map_location="cpu", weights_only=True)["modules"]
        for name in names:
            getattr(parts, name).load_state_dict(modules[name])
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in parts.state_dict().items()}
    save_file(tensors, folder / "judge.safetensors")
    card = calibrate(Judge(folder))
    (folder / "judge.json").write_text(json.dumps(card, indent=1) + "\n")


def pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [0, 1]."""
    return (as_tensor(pictures) + 1) / 2


def calibrate(judge: Judge, count: int = 1000) -> dict:
    """Accuracy of every reader on `count` fresh drawings, retrieval by text, and real-against-real similarities."""
    scenes = _scenes(count, 2, looks=0.0)
    drawn = pixels(_drawn(scenes))
    readings = judge.read(drawn)
    accuracy = {}
    for name in ATTRIBUTES:
        asked = [(s, r) for s, r in zip(scenes, readings) if name != "accessory_colour" or s.accessory != "none"]
        accuracy[name] = round(sum(getattr(s, name) == r[name] for s, r in asked) / len(asked), 4)
    rng = random.Random("calibration")
    texts = judge.text([caption(s, rng, complete=True, rare=0.0) for s in scenes])
    pictures = judge.picture(drawn)
    similarity = pictures @ texts.T
    blocks = [similarity[i : i + 50, i : i + 50] for i in range(0, count, 50)]
    retrieval = float(torch.stack([(b.argmax(1) == torch.arange(len(b))).float().mean() for b in blocks]).mean())
    references = {
        name: pixels(np.stack([np.asarray(p) for p in s.references()])) for name, s in subjects.SUBJECTS.items()
    }
    roles = {"identity": judge.identity, "picture": judge.picture}
    same: dict[str, float] = {}
    for role, embed in roles.items():
        embedded = {name: embed(x) for name, x in references.items()}
        within = [(e @ e.T)[~torch.eye(len(e), dtype=torch.bool)].mean() for e in embedded.values()]
        across = [(embedded[a] @ embedded[b].T).mean() for a in embedded for b in embedded if a != b]
        same[f"{role}_real_against_real"] = round(float(torch.stack(within).mean()), 4)
        same[f"{role}_real_against_other"] = round(float(torch.stack(across).mean()), 4)
    return {
        "pictures": count,
        "accuracy": accuracy,
        "text_retrieval_in_50": round(retrieval, 4),
        "text_real": round(float(similarity.diagonal().mean()), 4),
        "text_mismatched": round(float((similarity.sum() - similarity.diagonal().sum()) / (count * (count - 1))), 4),
        **same,
    }
