"""Reference pictures and their loss masks, from a folder or from ComfyUI's batches, at the sizes to train on."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..checks import check_count
from .captions import read_caption

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MASK_ENDING = "-masklabel.png"
"""The mask of dog.jpg is dog-masklabel.png beside it, as OneTrainer and mask editors name it: white counts."""
MAX_ASPECT = 4

Sizes = int | Sequence[tuple[int, int]]
"""The edge of a square, or the (height, width) sizes of which a picture takes the one nearest in aspect ratio."""


@dataclass(frozen=True)
class References:
    """Reference pictures in float32 with their names; sizes may differ.

    Args:
        pixels: one (3, H, W) a picture, in [0, 1].
        masks: one (1, H, W) a picture, in [0, 1], 1 where its loss counts; each counts somewhere.
        captions: one text a picture.
    """

    pixels: list[Tensor]
    names: list[str]
    masks: list[Tensor] | None = None
    captions: list[str] | None = None

    def __post_init__(self):
        if not self.pixels:
            raise ValueError("references holds no picture, but a training takes at least one")
        for field in ("names", "masks", "captions"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.pixels):
                raise ValueError(
                    f"{field} has {len(values)} entries, but it takes one for each of {len(self)} pictures"
                )
        for name, picture in zip(self.names, self.pixels):
            if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
                raise ValueError(
                    f"reference {name} is {tuple(picture.shape)} {picture.dtype}, but it takes float (3, H, W)"
                )
            if not bool(torch.isfinite(picture).all()):
                raise ValueError(f"reference {name} holds NaN or infinite values, but it takes values in [0, 1]")
        for name, picture, mask in zip(self.names, self.pixels, self.masks or ()):
            if mask.shape != (1, *picture.shape[1:]):
                raise ValueError(f"mask of {name} is {tuple(mask.shape)}, but it takes {(1, *picture.shape[1:])}")
            if not bool(((mask >= 0) & (mask <= 1)).all()):
                raise ValueError(f"mask of {name} has NaN or values out of [0, 1]; give one of ComfyUI's or a picture")
            if not bool(mask.any()):
                raise ValueError(f"mask of {name} is empty; make it white (or opaque) where the subject is")

    def __len__(self) -> int:
        return len(self.pixels)

    def stack(self) -> Tensor:
        """All pictures, (N, 3, H, W); ValueError if their sizes differ."""
        sizes = {tuple(picture.shape[1:]) for picture in self.pixels}
        if len(sizes) > 1:
            raise ValueError(f"the references have sizes {sorted(sizes)}, but one size is needed; give a size")
        return torch.stack(self.pixels)


def bucket_sizes(resolution: int, multiple: int = 64) -> list[tuple[int, int]]:
    """The (height, width) sizes that pictures of many aspect ratios are trained at.

    As in sd-scripts: both edges are multiples of `multiple` (8 latents, 64 pixels for Stable Diffusion), and for each
    edge the other is the longest that keeps the area within resolution^2. The aspect ratio is at most 4:1.
    """
    check_count("multiple", multiple)
    if check_count("resolution", resolution) % multiple:
        raise ValueError(f"resolution is {resolution}, but aspect buckets take a multiple of {multiple}")
    edges = range(multiple, 2 * resolution + 1, multiple)  # 2 r x r / 2 is of 4:1
    pairs = [(edge, resolution**2 // edge // multiple * multiple) for edge in edges]
    pairs = [(a, b) for a, b in pairs if b and max(a, b) <= MAX_ASPECT * min(a, b)]
    return sorted({*pairs, *((b, a) for a, b in pairs)})


def picture_files(folder: str | Path, option: str = "references") -> list[Path]:
    """The picture files of a folder, without masks, in natural order; ValueError, naming `option`, if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{option} is {str(folder)!r}, which is no folder, but it takes a folder of pictures")
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()]
    files = sorted((f for f in files if not f.name.endswith(MASK_ENDING)), key=lambda file: _natural(file.name))
    if not files:
        raise ValueError(f"{option} folder {folder} holds no picture; put {', '.join(PICTURE_SUFFIXES)} files there")
    return files


def read_picture(file: Path) -> Tensor:
    """A picture (3, H, W) in [0, 1] at its own size, upright, over white; ValueError if it cannot be read."""
    return _to_tensor(_over_white(_open(file)))


def load_references(folder: str | Path, size: Sizes, *, masks: bool = False, captions: bool = False) -> References:
    """The pictures of a folder, in natural order (2.png before 10.png).

    The EXIF orientation is applied and transparency is laid over white. Each picture is cut to the aspect ratio of its
    size about its centre and resized to it; one that is smaller is enlarged, which is logged. Files that are no
    pictures by their suffix are passed over, and so are masks.

    Args:
        size: edge of a square, or sizes as `bucket_sizes` gives them.
        masks: read a mask for every picture: `name-masklabel.png` beside it, as large as it, or else its alpha channel.
        captions: read `name.txt` beside every picture.

    Raises:
        ValueError: if the folder does not exist or holds no picture; naming the picture if it, its mask or its caption
            cannot be read, is empty or is missing, or if it is longer than 4:1.
    """
    sizes, files = _sizes(size), picture_files(folder)
    texts = [read_caption(file) for file in files] if captions else None
    read = [_read(file, sizes, masks) for file in files]
    names = [file.name for file in files]
    found = [mask for _, mask in read if mask is not None]
    if masks and len(found) < len(read):
        bare = next(name for name, (_, mask) in zip(names, read) if mask is None)
        masked = next((f", while {name} has one" for name, (_, mask) in zip(names, read) if mask is not None), "")
        raise ValueError(
            f"masks are asked for, but {bare} has neither an alpha channel nor a {Path(bare).stem}{MASK_ENDING}"
            f"{masked}; give every picture a mask or train without masks"
        )
    return References([pixels for pixels, _ in read], names, found if masks else None, texts)


def from_images(
    images: Tensor, size: Sizes | None = None, masks: Tensor | bool | None = None, name: str = "images"
) -> References:
    """References from ComfyUI's IMAGE, (B, H, W, C) in [0, 1] with C = 3, or 4 (alpha laid over white).

    Args:
        size: as for `load_references`; without it, the pictures are taken as they are.
        masks: ComfyUI's MASK, (B, H, W), 1 where the loss counts; or True for the alpha channel.
        name: what the images are called in errors.

    Raises:
        ValueError: for other shapes, no picture, NaN, an empty mask, or pictures that are longer than 4:1.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ValueError(f"{name} is {tuple(images.shape)}, but it takes (B, H, W, 3) or (B, H, W, 4)")
    if not len(images):
        raise ValueError(f"{name} holds no picture, but it takes at least one")
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{name} holds NaN or infinite values, but it takes values in [0, 1]")
    height, width = images.shape[1:3]
    _check_aspect(name, width, height)
    pixels = images.detach().float().movedim(-1, 1).clone()  # (B, C, H, W)
    if masks is True:
        if pixels.shape[1] == 3:
            raise ValueError(f"masks of the alpha channel are asked for, but {name} has none; connect masks")
        masks = pixels[:, 3]
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:]
        pixels = pixels[:, :3] * alpha + (1 - alpha)
    if isinstance(masks, Tensor):
        if masks.shape != images.shape[:3]:
            raise ValueError(f"masks is {tuple(masks.shape)}, but for these images it takes {tuple(images.shape[:3])}")
        masks = masks.detach().float().unsqueeze(1).clone()  # (B, 1, H, W)
    else:
        masks = None
    if size is not None:
        target = _nearest(_sizes(size), width, height)
        pixels = _fit(pixels, target, "bicubic")
        masks = None if masks is None else _fit(masks, target, "bilinear").clamp(0, 1)
    names = [f"image {index + 1}" for index in range(len(images))]
    return References(list(pixels.clamp(0, 1)), names, None if masks is None else list(masks))


def _sizes(size: Sizes) -> list[tuple[int, int]]:
    if isinstance(size, Sequence):
        if not size:
            raise ValueError("size is empty, but it takes an edge in pixels, or (height, width) sizes")
        return [(check_count("size", height), check_count("size", width)) for height, width in size]
    check_count("size", size)
    return [(size, size)]


def _check_aspect(name: str, width: int, height: int) -> None:
    short, long = sorted((width, height))
    if long > MAX_ASPECT * short:
        raise ValueError(
            f"{name} is {width}x{height}, of aspect ratio {long / max(short, 1):.4g}:1, "
            f"but it takes at most {MAX_ASPECT}:1; cut it"
        )


def _nearest(sizes: list[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
    """The (height, width) nearest to the picture's aspect ratio; of two, the larger."""
    return min(sizes, key=lambda size: (abs(math.log(size[1] * height / (size[0] * width))), -size[0] * size[1]))


def _box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest part about the centre that has the aspect ratio of (height, width)."""
    inner_width = max(1, min(width, round(height * size[1] / size[0])))
    inner_height = max(1, min(height, round(width * size[0] / size[1])))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _fit(batch: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(B, C, H, W) cut about the centre and resized to (B, C, *size)."""
    left, top, right, bottom = _box(batch.shape[3], batch.shape[2], size)
    batch = batch[:, :, top:bottom, left:right]
    return batch if batch.shape[2:] == size else interpolate(batch, size, mode=mode, antialias=True)


def _natural(name: str) -> list[Any]:
    # Digits and text alternate, so that numbers are only ever compared with numbers.
    return [int(part) if part.isdigit() else part.casefold() for part in re.split(r"([0-9]+)", name)] + [name]


def _read(file: Path, sizes: list[tuple[int, int]], masks: bool) -> tuple[Tensor, Tensor | None]:
    """A picture, (3, h, w), and its mask, (1, h, w), if masks are read and it has one."""
    from PIL import Image

    picture = _open(file)
    _check_aspect(f"picture {file}", *picture.size)
    mask = None
    if picture.mode == "RGBA":
        mask = picture.getchannel("A")
        picture = _over_white(picture)
    mask_file = file.with_name(f"{file.stem}{MASK_ENDING}")
    if masks and mask_file.is_file():
        mask = _open(mask_file).convert("L")
        if mask.size != picture.size:
            raise ValueError(
                f"mask {mask_file} is {mask.width}x{mask.height}, but it takes {picture.width}x{picture.height}, "
                f"the size of {file.name}"
            )
    height, width = size = _nearest(sizes, *picture.size)
    box = _box(*picture.size, size)
    if box[2] - box[0] < width or box[3] - box[1] < height:
        logger.warning("%s is %dx%d, and is enlarged to %dx%d", file, *picture.size, width, height)
    # Cut first: a resize of a box would let in what is outside of it.
    pixels = _to_tensor(picture.crop(box).resize((width, height), Image.Resampling.LANCZOS))
    if mask is None or not masks:
        return pixels, None
    return pixels, _to_tensor(mask.crop(box).resize((width, height), Image.Resampling.BILINEAR))


def _open(file: Path) -> Image:
    """The whole picture, upright, in RGB or (with transparency) RGBA."""
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
                picture = Image.fromarray((numpy.asarray(picture).clip(0, 65535) >> 8).astype(numpy.uint8))
            clear = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
            return picture.convert("RGBA" if clear else "RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"picture {file} cannot be read ({reason}); replace it or take it out of the folder"
        ) from error


def _over_white(picture: Image) -> Image:
    from PIL import Image

    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _to_tensor(picture: Image) -> Tensor:
    """(C, H, W) in [0, 1]."""
    import numpy

    array = torch.from_numpy(numpy.array(picture))
    return array.view(picture.height, picture.width, -1).movedim(-1, 0).float() / 255


def as_picture(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to uint8 (H, W, 3)."""
    return (picture.clamp(0, 1).movedim(0, -1).cpu().numpy() * 255).round().astype(np.uint8)
