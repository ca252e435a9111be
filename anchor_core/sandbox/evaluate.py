"""Whether the embedded model draws what a caption says, by the judge's readers; and its model card."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..backends.diffusers.denoiser import DiffusersDenoiser
from . import world
from .captions import caption
from .judge import Judge
from .pretrain import PretrainSettings

SAMPLING = {"steps": 25, "guidance": 4.0}


def held_out_captions(count: int, seed: int, used: Collection[str] = ()) -> list[tuple[world.Scene, str]]:
    """Scenes with captions that say shape, colour, pattern, background and accessory; none of them in `used`."""
    rng = random.Random(f"held out {seed}")
    captions = []
    while len(captions) < count:
        scene = world.sample_scene(rng)
        text = caption(scene, rng, complete=True, rare=0.0)
        if text not in used:
            captions.append((scene, text))
    return captions


def draw_captions(denoiser: DiffusersDenoiser, texts: list[str], seed: int, batch: int = 25) -> Tensor:
    """One picture a text, (N, 3, 64, 64) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shape = denoiser.latent_shape(denoiser.default_resolution, denoiser.default_resolution)
    negative = denoiser.encode_prompt("")
    pictures = []
    for i in range(0, len(texts), batch):
        conditions = [denoiser.encode_prompt(text) for text in texts[i : i + batch]]
        noise = torch.randn((len(conditions), *shape), generator=generator)
        pictures.append(denoiser.decode_latents(denoiser.sample(conditions, negative, noise, **SAMPLING)))
    return torch.cat(pictures)


def accuracies(scenes: list[world.Scene], readings: list[dict[str, str]]) -> dict[str, float]:
    """Share of pictures on which each reader finds what was asked for.

    `accessory` is right when the kind is, and the colour too where there is one.
    """

    def share(right: list[bool]) -> float:
        return round(sum(right) / len(right), 4)

    pairs = list(zip(scenes, readings, strict=True))
    result = {
        name: share([getattr(s, name) == r[name] for s, r in pairs])
        for name in ("shape", "colour", "background", "pattern")
    }
    result["accessory"] = share(
        [
            s.accessory == r["accessory"] and (s.accessory == "none" or s.accessory_colour == r["accessory_colour"])
            for s, r in pairs
        ]
    )
    result["accessory_kind"] = share([s.accessory == r["accessory"] for s, r in pairs])
    return result


def evaluate(folder: Path, judge: Judge, count: int = 500, seed: int = 0, used: Collection[str] = ()) -> dict:
    """Accuracies of the model in `folder` on `count` held-out captions."""
    captions = held_out_captions(count, seed, used)
    denoiser = DiffusersDenoiser.from_pretrained(folder)
    pictures = draw_captions(denoiser, [text for _, text in captions], seed)
    scores = accuracies([scene for scene, _ in captions], judge.read(pictures))
    return {"captions": count, "seed": seed, "sampling": SAMPLING, **scores}


def describe(work: Path, folder: Path, settings: PretrainSettings) -> dict:
    """Write the model card into `folder`: `README.md`, `training.json`, `samples.png`. Gives the accuracies."""
    judge = Judge(folder / "judge")
    used = {text for texts in json.loads((work / "captions.json").read_text()) for text in texts}
    scores = evaluate(folder, judge, used=used)
    logs = {path.name.split(".")[0]: _thinned(path) for path in sorted(work.glob("*.log.jsonl"))}
    card = {"settings": asdict(settings), "accuracy": scores, "judge": judge.card, "log": logs}
    (folder / "training.json").write_text(json.dumps(card) + "\n")
    captions = held_out_captions(40, 1, used)
    _sample_grid(folder, captions)
    (folder / "README.md").write_text(_card_text(card, [text for _, text in captions]))
    return scores


def _card_text(card: dict, captions: list[str]) -> str:
    def rows(values: dict) -> str:
        return "".join(f"| {key.replace('_', ' ')} | {value} |\n" for key, value in values.items())

    drawn = {key: value for key, value in card["accuracy"].items() if isinstance(value, float)}
    judged = {f"reader: {key}": value for key, value in card["judge"]["accuracy"].items()}
    judged |= {key: value for key, value in card["judge"].items() if key != "accuracy"}
    ends = {
        name: " -> ".join(f"{key} {value}" for key, value in lines[-1].items() if key != "seconds")
        for name, lines in card["log"].items()
    }
    sampling = card["accuracy"]["sampling"]
    return f"""# The embedded model

A text-to-image latent diffusion model of SD1.5's classes at a small size (CLIPTextModel, UNet2DConditionModel with
v-prediction, AutoencoderTiny; 64 x 64 pictures, 4 x 16 x 16 latents), in diffusers' folder layout, float16.
Pretrained from nothing by `semantic-anchor sandbox pretrain` on pictures that code draws
(`anchor_core/sandbox/world.py`, `captions.py`); no other data went in. Licence: Apache-2.0.

Captions name shapes, colours, patterns, outlines, surroundings, accessories, neighbours, position and size in many
phrasings, 15 % of them with a rare adjective without meaning. `sks`, `ohwx`, `zwx` and `qwe` are single tokens that no
caption used. The text tower was trained contrastively against a small picture encoder, and then together with the
denoiser. The decoder alone learnt on pictures of which half have a look of the subjects' family, though none of theirs,
so that it can draw what an adapter learns. At last denoiser and text tower learnt on such pictures too, each look named
by a rare adjective, so that a rare word can carry a subject: its vector is a neutral one and a linear code of the look
(`anchor_core/sandbox/naming.py`). The vocabulary's rare words end as names of looks, the four unused tokens as the
neutral vector.

![samples](samples.png)

## What it draws

Share of {card["accuracy"]["captions"]} captions, none of them used in training, on which the judge's reader finds
what the caption says (DDIM, {sampling["steps"]} steps, guidance {sampling["guidance"]}). `accessory` counts kind and
colour, `accessory kind` the kind alone.

| | |
|---|---|
{rows(drawn)}
## The judge

Encoders and readers trained apart from the generator, on other pictures, measured on {card["judge"]["pictures"]} fresh
drawings.
`identity` is in the role of DINO, `picture` in that of CLIP-I, `text` in that of CLIP-T.

| | |
|---|---|
{rows(judged)}
## Settings and log

{", ".join(f"{key} {value}" for key, value in card["settings"].items())}. The end of each stage's log, of which
`training.json` holds more points:

| stage | |
|---|---|
{rows(ends)}
## The captions of the samples, row by row

{"".join(f"{i + 1}. {caption}" + chr(10) for i, caption in enumerate(captions))}"""


def _thinned(path: Path, points: int = 40) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[:: max(1, len(lines) // points)] + lines[-1:]


def _sample_grid(folder: Path, captions) -> None:
    from PIL import Image

    from ..data.pictures import as_picture

    pictures = draw_captions(DiffusersDenoiser.from_pretrained(folder), [text for _, text in captions], 1)
    grid = Image.new("RGB", (10 * 66, -(-len(pictures) // 10) * 66), "white")
    for i, picture in enumerate(pictures):
        grid.paste(Image.fromarray(as_picture(picture)), (i % 10 * 66 + 1, i // 10 * 66 + 1))
    grid.save(folder / "samples.png", optimize=True)
