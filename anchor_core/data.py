"""What a training is given: reference pictures and the two prompts of the concept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_count, check_number

if TYPE_CHECKING:
    from PIL.Image import Image

    from .denoiser import Denoiser

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Concept:
    """The subject prompt ("a photo of a sks dog") and the class prompt ("a photo of a dog").

    Raises:
        ValueError: if one is empty or no text, or if both are the same: the anchor would then hold the subject
            prompt to what it meant before, and nothing could be learnt.
    """

    subject_prompt: str
    class_prompt: str

    def __post_init__(self):
        for name in ("subject_prompt", "class_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r}, but it takes a text that is not empty")
            object.__setattr__(self, name, " ".join(value.split()))
        if self.subject_prompt.casefold() == self.class_prompt.casefold():
            raise ValueError(
                f"class_prompt is {self.class_prompt!r}, the same as subject_prompt; "
                "put a rare word such as sks into the subject prompt only"
            )


@dataclass(frozen=True)
class References:
    """Reference pictures in [0, 1], each of shape (3, H, W), in float32, with their names."""

    pixels: list[Tensor]
    names: list[str]

    def __post_init__(self):
        if not self.pixels:
            raise ValueError("references holds no picture, but a training takes at least one")
        for name, picture in zip(self.names, self.pixels, strict=True):
            if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
                raise ValueError(
                    f"reference {name} is {tuple(picture.shape)} {picture.dtype}, but it takes float (3, H, W)"
                )
            if not bool(torch.isfinite(picture).all()):
                raise ValueError(f"reference {name} holds NaN or infinite values, but it takes values in [0, 1]")

    def __len__(self) -> int:
        return len(self.pixels)

    def stack(self) -> Tensor:
        """All pictures, (N, 3, H, W); ValueError if their sizes differ."""
        sizes = {tuple(picture.shape[1:]) for picture in self.pixels}
        if len(sizes) > 1:
            raise ValueError(f"the references have sizes {sorted(sizes)}, but one size is needed; give a size")
        return torch.stack(self.pixels)


def load_references(folder: str | Path, size: int) -> References:
    """The pictures of a folder, in natural order (2.png before 10.png), each size x size.

    The EXIF orientation is applied, transparency is laid over white, and the centre square is cut out and resized.
    Files that are no pictures by their suffix are passed over.

    Raises:
        ValueError: if the folder does not exist, holds no picture, or a picture cannot be read (naming it).
    """
    check_count("size", size)
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"references is {str(folder)!r}, which is no folder, but it takes a folder of pictures")
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()]
    if not files:
        raise ValueError(f"references folder {folder} holds no picture; put {', '.join(PICTURE_SUFFIXES)} files there")
    files.sort(key=lambda file: _natural(file.name))
    return References([_read(file, size) for file in files], [file.name for file in files])


def from_images(images: Tensor, size: int | None = None) -> References:
    """References from ComfyUI's IMAGE, (B, H, W, C) in [0, 1] with C = 3, or 4 (alpha laid over white).

    With `size`, the centre square is cut out and resized; without, the pictures are taken as they are.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ValueError(f"images is {tuple(images.shape)}, but it takes (B, H, W, 3) or (B, H, W, 4)")
    pixels = images.detach().float().movedim(-1, 1).clone()  # (B, C, H, W)
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:]
        pixels = pixels[:, :3] * alpha + (1 - alpha)
    if size is not None:
        check_count("size", size)
        side = min(pixels.shape[2:])
        top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
        pixels = pixels[:, :, top : top + side, left : left + side]
        if side != size:
            pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return References(list(pixels.clamp(0, 1)), [f"image {index + 1}" for index in range(len(pixels))])


def _natural(name: str) -> list[Any]:
    # Digits and text alternate, so that numbers are only ever compared with numbers.
    return [int(part) if part.isdigit() else part.casefold() for part in re.split(r"([0-9]+)", name)] + [name]


def _read(file: Path, size: int) -> Tensor:
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            picture = _over_white(ImageOps.exif_transpose(opened))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"picture {file} cannot be read ({reason}); replace it or take it out of the folder"
        ) from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    # Cut first: a resize of a box would let in what is outside of it.
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.asarray(picture).copy()).movedim(-1, 0).float() / 255


def _over_white(picture: Image) -> Image:
    from PIL import Image as images

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return images.alpha_composite(images.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


@torch.no_grad()
def sample_class_latents(
    denoiser: Denoiser,
    concept: Concept,
    count: int,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 5.0,
    batch_size: int = 8,
) -> Tensor:
    """Latents (count, C, h, w) that the pretrained network makes of the class prompt: the class pictures of Eq. 2.

    `shape` is that of one latent, (C, h, w). The adapter is off while they are made.
    """
    check_count("count", count)
    check_number("guidance", guidance, minimum=0)
    generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))
    noise = torch.randn((count, *shape), generator=generator).to(denoiser.device)
    class_, negative = denoiser.encode_prompt(concept.class_prompt), denoiser.encode_prompt("")
    with denoiser.adapter_disabled():
        return torch.cat(
            [
                denoiser.sample([class_] * len(part), negative, part, steps=steps, guidance=guidance)
                for part in noise.split(batch_size)
            ]
        )
