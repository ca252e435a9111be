"""The encoders behind CLIP-I, CLIP-T and DINO: CLIP and DINO by transformers, or the sandbox's judge in their roles."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..data.pictures import as_picture
from .metrics import Encoders

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def preprocess(picture: Tensor, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A picture (3, H, W) in [0, 1] to a network's input (3, crop, crop), as torchvision's transforms of CLIP and DINO.

    The shorter edge becomes `resize` by Pillow's bicubic filter on 8 bits, then the centre is cut, then normalised.
    """
    from PIL import Image

    image = Image.fromarray(as_picture(picture))
    short = min(image.size)
    image = image.resize([int(resize * edge / short) for edge in image.size], Image.Resampling.BICUBIC)
    left, top = (round((edge - crop) / 2) for edge in image.size)
    pixels = image.crop((left, top, left + crop, top + crop)).tobytes()
    channels = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(crop, crop, 3).movedim(-1, 0).float() / 255
    return (channels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class _Network:
    """A frozen network that takes preprocessed pictures in batches.

    Attributes:
        batch: rows of a pass: what fits, as no score depends on it.
    """

    batch = BATCH

    def __init__(self, network: nn.Module, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]):
        self.network = network.eval().requires_grad_(False)
        self._transform = resize, crop, mean, std

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures (3, H, W) in [0, 1], of any sizes, to embeddings (N, D) on the CPU."""
        embedded = []
        with ThreadPoolExecutor() as pool:  # Pillow resizes outside of the interpreter's lock
            for start in range(0, len(pictures), self.batch):
                part = pictures[start : start + self.batch]
                rows = torch.stack(list(pool.map(lambda picture: preprocess(picture, *self._transform), part)))
                embedded.append(self._embed(rows.to(self.device, self.dtype)).float().cpu())
        return torch.cat(embedded)

    def _embed(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


class Clip(_Network):
    """Both halves of a `transformers.CLIPModel`: pictures by calling it, prompts by `text`; (N, D) each, unnormalised.

    The papers do not name their variant; ViT-B/32 has their range of CLIP-T. Prompts are cut at CLIP's 77 tokens.
    """

    def __init__(self, network: nn.Module, tokenizer):
        side = network.config.vision_config.image_size
        super().__init__(network, side, side, CLIP_MEAN, CLIP_STD)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Clip:
        """Of a folder in transformers' layout, or a name on the Hugging Face hub; ValueError if that is no CLIP."""
        from transformers import CLIPModel, CLIPTokenizer

        network = _load("clip", path, {"clip": CLIPModel}, "openai/clip-vit-base-patch32")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(path)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"clip is {str(path)!r}, whose tokenizer cannot be read; copy its files there") from error
        return cls(network.to(device), tokenizer)

    def _embed(self, rows: Tensor) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pixel_values=rows).pooler_output)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to (N, D) on the CPU."""
        told, embedded = list(prompts), []
        for start in range(0, len(told), self.batch):
            part = told[start : start + self.batch]
            # All of one length: in half precision a row's rounding goes with it, and so would a score with its batch.
            tokens = self.tokenizer(part, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
            tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            embedded.append(self.network.text_projection(self.network.text_model(**tokens).pooler_output).float().cpu())
        return torch.cat(embedded)


class Dino(_Network):
    """The class token of a DINO, after the last layer norm, (N, D).

    DreamBench's is `facebook/dino-vits16`; DINOv2 and DINOv3 are taken too, and give other figures. Preprocessing is
    that of DINO's own evaluation: the shorter edge to 256, the centre 224.
    """

    def __init__(self, network: nn.Module):
        # A ViT takes pictures of one size; the later ones are trained on others than they are used on.
        crop = network.config.image_size if network.config.model_type == "vit" else 224
        super().__init__(network, crop * 256 // 224, crop, IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Dino:
        """Of a folder in transformers' layout, or a name on the Hugging Face hub; ValueError if that is no DINO."""
        from transformers import AutoModel, ViTModel

        kinds = {"vit": ViTModel} | dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), AutoModel)
        return cls(_load("dino", path, kinds, "facebook/dino-vits16").to(device))

    def _embed(self, rows: Tensor) -> Tensor:
        return self.network(pixel_values=rows).last_hidden_state[:, 0]


def _load(option: str, path: str | Path, kinds: dict[str, Any], example: str) -> nn.Module:
    """The network of `path` by the class of its type; ValueError that names the option, if it is of another type."""
    from transformers import AutoConfig

    takes = f"it takes a folder in transformers' layout, or a name on the hub, of a model such as {example}"
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind in kinds:
            # A ViT's pooler is no part of DINO; DINO's files do not have one.
            options = {"add_pooling_layer": False} if kind == "vit" else {}
            network, loaded = kinds[kind].from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{option} is {str(path)!r}, which cannot be opened ({reason:.200}), but {takes}") from error
    if kind not in kinds:
        raise ValueError(f"{option} is {str(path)!r}, a model of type {kind}, but {takes}")
    if loaded["missing_keys"]:
        raise ValueError(f"{option} is {str(path)!r}, which lacks weights ({min(loaded['missing_keys'])}), but {takes}")
    return network.float()  # a file in half precision would stay so


def open_encoders(
    clip: str | Path | None,
    dino: str | Path | None,
    device: str | torch.device = "cpu",
    dtype: str = "fp32",
    batch_size: int = BATCH,
) -> Encoders:
    """The encoders of a comparison from folders in transformers' layout or names on the hub; without one, no metric.

    In half precision a cosine is off by about 1e-3.
    """
    check_choice("encoder_dtype", dtype, DTYPES)
    first = None if clip is None else Clip.from_pretrained(clip, device)
    second = None if dino is None else Dino.from_pretrained(dino, device)
    for each in (first, second):
        if each is not None:
            each.network.to(DTYPES[dtype])
            each.batch = check_count("encoder_batch", batch_size)
    names = dict.fromkeys(("clip_i", "clip_t"), str(clip)) | {"dino": str(dino)}
    return Encoders(first, None if first is None else first.text, second, names)


def sandbox_encoders() -> Encoders:
    """The sandbox's judge in the roles of CLIP and DINO, for pictures of its world."""
    from ..sandbox.judge import Judge

    judge = Judge()

    def one_by_one(encode):
        return lambda pictures: torch.cat([encode(picture[None]) for picture in pictures])

    names = {"clip_i": "sandbox picture judge", "clip_t": "sandbox text judge", "dino": "sandbox identity judge"}
    return Encoders(one_by_one(judge.picture), judge.text, one_by_one(judge.identity), names)
