"""Pretraining of the embedded model from nothing: pictures, tokenizer, autoencoder, text tower, denoiser, rare words.

Each stage keeps its state in the work folder and picks up where it was left. The text tower is first trained
contrastively against a small picture encoder, as CLIP is, and then goes on learning with the denoiser: the contrast
alone leaves words almost equal that rarely tell two pictures apart, such as `ball` and `box`, and the denoiser then
ignores them.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..workers import end_with_parent
from ..writing import whole
from . import model, tokenizer, world
from .captions import caption
from .naming import Names, draw
from .stage import Stage, autocast
from .subjects import random_look
from .towers import Contrast, as_tensor, contrastive_stage

log = logging.getLogger(__name__)


@dataclass
class PretrainSettings:
    """Sizes of the run; the defaults are those of the shipped weights.

    Attributes:
        pictures: drawn training pictures, each with `captions_per_picture` phrasings.
        *_steps: optimizer steps of a stage.
        *_batch: pictures a step.
        decoder_pictures: drawn for the decoder, half of them with looks of the subjects' family.
        names_pictures: drawn for the last stage, half of them with looks that a rare word names.
        *_rate: peak learning rate, reached after 200 steps and brought to zero over the last fifth.
        ema: decay of the averaged weights of denoiser and text tower, which are what is shipped.
        drop: share of captions replaced by the empty prompt, for classifier-free guidance.
    """

    pictures: int = 40000
    captions_per_picture: int = 3
    autoencoder_steps: int = 1500
    decoder_pictures: int = 12000
    decoder_steps: int = 4000
    decoder_rate: float = 1.5e-3
    autoencoder_batch: int = 32
    text_steps: int = 700
    text_batch: int = 128
    denoiser_steps: int = 11300
    denoiser_batch: int = 32
    denoiser_rate: float = 8e-4
    names_pictures: int = 16000
    names_steps: int = 3600
    names_rate: float = 4e-4
    ema: float = 0.999
    drop: float = 0.1
    seed: int = 0


# --- data -----------------------------------------------------------------------------------------------------------


def _draw_range(arguments: tuple[int, int, int, int]) -> tuple[np.ndarray, list[list[str]], list[dict]]:
    start, stop, captions, seed = arguments
    pictures, texts, scenes = [], [], []
    for index in range(start, stop):
        rng = random.Random(f"{seed}/{index}")
        scene = world.sample_scene(rng)
        pictures.append(np.asarray(world.draw(scene)))
        texts.append([caption(scene, rng) for _ in range(captions)])
        scenes.append(asdict(scene))
    return np.stack(pictures), texts, scenes


def draw_dataset(count: int, captions: int, seed: int) -> tuple[np.ndarray, list[list[str]], list[dict]]:
    """`count` pictures, uint8 (N, 64, 64, 3), with their captions and scenes, drawn by all cores."""
    from concurrent.futures import ProcessPoolExecutor

    chunks = [(i, min(i + 500, count), captions, seed) for i in range(0, count, 500)]
    with ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent) as pool:
        parts = list(tqdm(pool.map(_draw_range, chunks), total=len(chunks), desc="pictures", unit="x500"))
    return (
        np.concatenate([p[0] for p in parts]),
        [text for p in parts for text in p[1]],
        [scene for p in parts for scene in p[2]],
    )


def _stage_data(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    if (work / "captions.json").exists():
        return
    pictures, captions, _ = draw_dataset(settings.pictures, settings.captions_per_picture, settings.seed)
    np.save(work / "pictures.npy", pictures)
    _write_json(work / "captions.json", captions)


def _write_json(path: Path, value) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(value))


def load_pictures(work: Path) -> np.ndarray:
    return np.load(work / "pictures.npy")


def _stage_tokenizer(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    if not (work / "tokenizer").exists():
        tokenizer.build(work / "tokenizer")


# --- autoencoder ----------------------------------------------------------------------------------------------------


def _stage_autoencoder(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    """The encoder, with a small decoder that only teaches it."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(settings.seed)
    small = {"decoder_block_out_channels": (32, 32, 32), "num_decoder_blocks": (2, 2, 1)}
    vae = AutoencoderTiny(**{**model.VAE, **small}).to(device)
    stage = Stage(work, "autoencoder", {"vae": vae}, 2e-3, settings.autoencoder_steps, decay=0.0)
    _reconstruct(stage, vae, load_pictures(work), settings)


def _stage_decoder(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    """A decoder for the encoder as the denoiser knows it, half of it on looks of the subjects' family, never theirs.

    The denoiser sees none of these. A decoder that knows ordinary looks alone cannot draw a subject, whatever is
    learnt: of real pictures it kept as little as a third of their identity.
    """
    torch.manual_seed(settings.seed)
    vae = load_encoder(work).to(device)
    vae.decoder.requires_grad_(True)
    stage = Stage(work, "decoder", {"decoder": vae.decoder}, settings.decoder_rate, settings.decoder_steps, decay=0.0)
    rng, pictures = random.Random(f"looks {settings.seed}"), []
    for _ in tqdm(range(min(settings.decoder_pictures, settings.pictures)), desc="looks"):
        scene = world.sample_scene(rng)
        pictures.append(world.draw(replace(scene, paint=random_look(rng)) if rng.random() < 0.5 else scene))
    _reconstruct(stage, vae, np.stack([np.asarray(picture) for picture in pictures]), settings)


def _reconstruct(stage: Stage, vae, pictures: np.ndarray, settings: PretrainSettings) -> None:
    """Half-size crops: the network is convolutional, and a batch then holds more different pictures for its cost."""
    side, batch = model.PICTURE_SIZE // 2, settings.autoencoder_batch
    device = next(vae.parameters()).device
    for rng in stage:
        index, corner = np.sort(rng.integers(0, len(pictures), batch)), rng.integers(0, side + 1, (batch, 2))
        crops = np.stack([pictures[i][y : y + side, x : x + side] for i, (y, x) in zip(index, corner)])
        x = as_tensor(crops).to(device)
        with autocast(device):
            latents = vae.encode(x).latents
            y = vae.decode(latents).sample.float()
        error = (y - x).abs().mean()
        stage.descend(error + 2 * F.mse_loss(y, x) + 1e-4 * latents.float().square().mean(), l1=error.item())


def load_encoder(work: Path):
    """An autoencoder with the trained encoder, and `scaling_factor` set to one over the latents' standard deviation.

    Its decoder is at random weights.
    """
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(**model.VAE)
    taught = torch.load(work / "autoencoder.pt", weights_only=True)["modules"]["vae"]
    vae.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in taught.items() if k.startswith("encoder.")})
    vae = vae.eval().requires_grad_(False)
    with torch.no_grad():
        spread = vae.encode(as_tensor(load_pictures(work)[:256])).latents.std()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 5))
    return vae


def load_autoencoder(work: Path):
    """The trained autoencoder, both halves."""
    vae = load_encoder(work)
    vae.decoder.load_state_dict(torch.load(work / "decoder.pt", weights_only=True)["modules"]["decoder"])
    return vae


# --- text tower -----------------------------------------------------------------------------------------------------


def build_text_tower(clip_tokenizer, seed: int):
    """CLIPTextModel at random weights, with token embeddings wide enough apart to be told from one another."""
    text = model.build(clip_tokenizer, seed)["text_encoder"]
    generator = torch.Generator().manual_seed(seed)
    for embedding, std in ((text.get_input_embeddings(), 0.1), (_position_embedding(text), 0.02)):
        with torch.no_grad():
            embedding.weight.normal_(0, std, generator=generator)
    return text


def _position_embedding(text) -> nn.Embedding:
    return next(m for name, m in text.named_modules() if name.endswith("position_embedding"))


def _stage_text(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    torch.manual_seed(settings.seed)
    clip_tokenizer = tokenizer.load(work / "tokenizer")
    text = build_text_tower(clip_tokenizer, settings.seed).to(device)
    contrast = Contrast(model.TEXT["hidden_size"]).to(device)
    stage = Stage(work, "text", {"text": text, "others": contrast}, 1e-3, settings.text_steps, decay=0.0)
    captions = json.loads((work / "captions.json").read_text())
    contrastive_stage(stage, text, contrast, clip_tokenizer, load_pictures(work), captions, settings.text_batch)


def load_text_tower(work: Path):
    clip_tokenizer = tokenizer.load(work / "tokenizer")
    text = build_text_tower(clip_tokenizer, 0)
    text.load_state_dict(torch.load(work / "text.pt", weights_only=True)["modules"]["text"])
    return clip_tokenizer, text.eval().requires_grad_(False)


# --- denoiser -------------------------------------------------------------------------------------------------------


def _latents(path: Path, vae, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Scaled latents of the pictures, float16, computed once."""
    if not path.exists():
        parts = []
        with torch.no_grad(), autocast(device):
            for i in tqdm(range(0, len(pictures), 64), desc="latents"):
                x = as_tensor(pictures[i : i + 64]).to(device)
                parts.append((vae.encode(x).latents.float() * vae.config.scaling_factor).half().cpu())
        with whole(path) as part:
            torch.save(torch.cat(parts), part)
    return torch.load(path, weights_only=True)


def _denoiser(work: Path, seed: int):
    """Tokenizer, and `unet` and `text` as they are before the denoiser is trained."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    clip_tokenizer, text = load_text_tower(work)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**model.UNET)
    unet.set_attn_processor(AttnProcessor())  # plain attention is the faster one on a CPU in bfloat16
    return clip_tokenizer, nn.ModuleDict({"unet": unet, "text": text})


def _averaged(work: Path, stage: str) -> dict[str, Tensor]:
    return torch.load(work / f"{stage}.pt", map_location="cpu", weights_only=True)["modules"]["ema"]


def _stage_denoiser(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    vae = load_encoder(work).to(device)
    clip_tokenizer, trained = _denoiser(work, settings.seed)
    latents = _latents(work / "latents.pt", vae, load_pictures(work), device)
    captions = json.loads((work / "captions.json").read_text())
    batches = _Batches(latents, captions, clip_tokenizer, settings)
    _denoise(work, "denoiser", trained.to(device), settings.denoiser_rate, settings.denoiser_steps, batches, settings)


def _stage_names(work: Path, settings: PretrainSettings, device: torch.device) -> None:
    """Denoiser and text tower once more, half of it on looks of the subjects' family, each named by a rare word."""
    vae = load_encoder(work).to(device)
    clip_tokenizer, trained = _denoiser(work, settings.seed)
    trained.load_state_dict(_averaged(work, "denoiser"))
    trained["names"] = names = Names(model.TEXT["hidden_size"])
    pictures, captions, looks = draw(
        min(settings.names_pictures, settings.pictures), settings.captions_per_picture, settings.seed
    )
    latents = _latents(work / "names.latents.pt", vae, pictures, device)
    batches = _Batches(latents, captions, clip_tokenizer, settings)
    batches.on_rows = lambda rng, rows: names.say(looks[rows].to(device), rng)
    trained.to(device)
    with names.spoken(trained["text"], clip_tokenizer):
        _denoise(work, "names", trained, settings.names_rate, settings.names_steps, batches, settings)


class _Batches:
    """Latents, noise, timesteps and tokens of a step's batch."""

    def __init__(self, latents: Tensor, captions: list[list[str]], clip_tokenizer, settings: PretrainSettings):
        self.latents, self.captions, self.tokenizer, self.settings = latents, captions, clip_tokenizer, settings
        self.on_rows = lambda rng, rows: None

    def __call__(self, rng: np.random.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = np.sort(rng.integers(0, len(self.latents), self.settings.denoiser_batch))
        z = self.latents[torch.from_numpy(index)].float().to(device)
        said = [self.captions[i][rng.integers(len(self.captions[i]))] for i in index]
        texts = ["" if rng.random() < self.settings.drop else text for text in said]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32)).to(device)
        t = torch.from_numpy(rng.integers(0, 1000, len(z))).to(device)
        self.on_rows(rng, torch.from_numpy(index))
        return z, noise, t, tokens.to(device)


def _denoise(
    work: Path,
    name: str,
    trained: nn.ModuleDict,
    rate: float,
    steps: int,
    batches: _Batches,
    settings: PretrainSettings,
) -> None:
    """Train `unet` and `text` to denoise; what is shipped is their average over the steps."""
    from diffusers import DDPMScheduler

    trained.requires_grad_(True)
    average = copy.deepcopy(trained).requires_grad_(False)
    stage = Stage(work, name, {"trained": trained, "ema": average}, rate, steps)
    scheduler = DDPMScheduler(
        **{k: v for k, v in model.SCHEDULER.items() if k not in ("set_alpha_to_one", "steps_offset")}
    )
    device = next(trained.parameters()).device
    for rng in stage:
        z, noise, t, tokens = batches(rng, device)
        with autocast(device):
            context = trained["text"](input_ids=tokens).last_hidden_state
            prediction = trained["unet"](scheduler.add_noise(z, noise, t), t, context).sample.float()
        stage.descend(F.mse_loss(prediction, scheduler.get_velocity(z, noise, t)))
        decay = min(settings.ema, (stage.step + 1) / (stage.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)


def assemble(work: Path, folder: Path, seed: int = 0) -> None:
    """Write the trained model as a diffusers folder in float16."""
    clip_tokenizer, trained = _denoiser(work, seed)
    trained["names"] = names = Names(model.TEXT["hidden_size"])
    trained.load_state_dict(_averaged(work, "names"))
    names.write(trained["text"], clip_tokenizer, seed)
    vae = load_autoencoder(work)
    preview = _latent_rgb(vae, load_pictures(work)[:256])
    model.save({"unet": trained["unet"], "vae": vae, "text_encoder": trained["text"]}, clip_tokenizer, folder)
    _write_json(folder / "vae" / "latent_rgb.json", preview)


def _latent_rgb(vae, pictures: np.ndarray) -> dict:
    """Least squares from scaled latents (4) to RGB in [-1, 1] (3): ComfyUI's quick preview while it samples."""
    x = as_tensor(pictures)
    with torch.no_grad():
        z = vae.encode(x).latents * vae.config.scaling_factor
    colours = F.interpolate(x, z.shape[-2:], mode="area").movedim(1, -1).reshape(-1, 3)
    z = z.movedim(1, -1).reshape(-1, z.shape[1])
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), colours).solution
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}


STAGES = {
    "data": _stage_data,
    "tokenizer": _stage_tokenizer,
    "autoencoder": _stage_autoencoder,
    "decoder": _stage_decoder,
    "text": _stage_text,
    "denoiser": _stage_denoiser,
    "names": _stage_names,
}


def run(work: Path, settings: PretrainSettings, stages: Iterable[str] = STAGES, device: str = "cpu") -> None:
    """Run the stages that are asked for, in order, each from where it was left."""
    work.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        log.info("stage %s", stage)
        STAGES[stage](work, settings, torch.device(device))
