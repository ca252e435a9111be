"""Reference pictures and their loss masks, from a folder or from ComfyUI's batches, at the sizes to train on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..checks import check_count, shown
from ..concept import plain_text
from .captions import read_caption
from .folder import MASK_ENDING, picture_contents
from .reading import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MAX_ASPECT = 4
_OPAQUE = (64, 64)  # what ComfyUI's LoadImage gives, all 0, as the mask of a picture without transparency

Sizes = int | Sequence[tuple[int, int]]
"""The edge of a square, or the (height, width) sizes of which a picture takes the one nearest in aspect ratio."""


@dataclass(frozen=True)
class References:
    """Reference pictures in float32 with their names; sizes may differ.

    Args:
        pixels: one (3, H, W) a picture, in [0, 1].
        names: what the pictures are called in errors and reports.
        masks: one (1, H, W) a picture, in [0, 1], 1 where its loss counts; each counts somewhere.
        captions: one text a picture, None for the concept's own prompt.
        left_out: files of their folder that are not among them, each with the reason.
    """

    pixels: list[Tensor]
    names: list[str]
    masks: list[Tensor] | None = None
    captions: Sequence[str | None] | None = None
    left_out: tuple[str, ...] = ()

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


def read_picture(file: Path) -> Tensor:
    """A picture (3, H, W) in [0, 1] at its own size, upright, over white; ValueError if it cannot be read."""
    return to_tensor(over_white(open_picture(file)))


def load_references(folder: str | Path, size: Sizes, *, masks: bool = False, captions: bool = False) -> References:
    """The pictures of a folder, in natural order (2.png before 10.png).

    The EXIF orientation is applied and transparency is laid over white. Each picture is cut to the aspect ratio of its
    size about its centre and resized to it; one that is smaller is enlarged, which is logged. What of the folder is
    read, and what is left out of it, is as `picture_contents` says.

    Args:
        size: edge of a square, or sizes as `bucket_sizes` gives them.
        masks: read a mask for every picture: `name-masklabel.png` (or another format) beside it, as large as it, or
            else its alpha channel.
        captions: read `name.txt` beside every picture.

    Raises:
        ValueError: if the folder does not exist or holds no picture; naming the picture if it, its mask or its caption
            cannot be read, is empty or is missing, or if it is longer than 4:1.
    """
    sizes, found = as_sizes(size), picture_contents(folder)
    texts = [read_caption(file) for file in found.pictures] if captions else None
    names = [shown(file.name) for file in found.pictures]
    pixels, own = [], []
    for file in found.pictures:
        picture, mask = read_reference(file, sizes, found.mask_of(file) if masks else None)
        pixels.append(picture)
        own.append(mask)
    if masks and any(mask is None for mask in own):
        bare = found.pictures[own.index(None)].stem
        masked = next((f", while {name} has one" for name, mask in zip(names, own) if mask is not None), "")
        raise ValueError(
            f"masks are asked for, but {names[own.index(None)]} has neither an alpha channel nor a "
            f"{shown(bare)}{MASK_ENDING}.png{masked}; give every picture a mask or train without masks"
        )
    left_out = tuple(f"{shown(name)}: {reason}" for name, reason in found.left_out.items())
    return References(pixels, names, own if masks else None, texts, left_out)


def from_images(
    images: Tensor | Sequence[Tensor],
    size: Sizes | None = None,
    masks: Tensor | Sequence[Tensor] | bool | None = None,
    name: str = "images",
    *,
    captions: Sequence[str] | None = None,
    invert_masks: bool = False,
) -> References:
    """References from ComfyUI's IMAGE, (B, H, W, C) in [0, 1] with C = 3, or 4 (alpha laid over white).

    Args:
        images: a batch, or ComfyUI's list of batches, whose sizes may differ.
        size: as for `load_references`; without it, the pictures are taken as they are.
        masks: ComfyUI's MASK, (B, H, W), 1 where the loss counts, one for each batch; or True for the alpha channel.
        name: what the images are called in errors.
        captions: one text a picture.
        invert_masks: the masks are as Load Image gives them: 1 where a picture is transparent, where the loss does not
            count, and an empty one of 64 x 64 for a picture without transparency.

    Raises:
        ValueError: for other shapes, no picture, NaN, an empty mask, or pictures that are longer than 4:1.
    """
    batches = list(images) if isinstance(images, (list, tuple)) else [images]
    odd = [type(batch).__name__ for batch in batches if not isinstance(batch, Tensor)]
    if odd:
        raise ValueError(f"{name} holds a {odd[0]} in the place of pictures; connect pictures")
    if not sum(map(len, batches)):
        raise ValueError(f"{name} holds no picture, but it takes at least one")
    given = [masks] * len(batches) if masks is None or isinstance(masks, bool) else masks
    given = [given] if isinstance(given, Tensor) else list(given)
    if len(given) != len(batches):
        raise ValueError(f"masks has {len(given)} batches, but it takes one for each of {len(batches)} of {name}")
    pixels, own = [], []
    for number, (batch, mask) in enumerate(zip(batches, given), 1):
        called = name if len(batches) == 1 else f"{name} {number}"
        pictures, cut = _from_batch(batch, size, mask, called, invert_masks)
        pixels += pictures
        own += [] if cut is None else cut
    if own:
        share = sum(mask.mean().item() for mask in own) / len(own)
        logger.info("masks: the loss counts in %.0f %% of the pixels of %s", 100 * share, name)
    texts = None if captions is None else [plain_text(caption) for caption in captions]
    return References(pixels, [f"image {number + 1}" for number in range(len(pixels))], own or None, texts)


def _from_batch(
    images: Tensor, size: Sizes | None, masks: Tensor | bool | None, name: str, invert_masks: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The pictures (3, h, w) of a batch and their masks (1, h, w)."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ValueError(f"{name} is {tuple(images.shape)}, but it takes (B, H, W, 3) or (B, H, W, 4)")
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{name} holds NaN or infinite values, but it takes values in [0, 1]")
    height, width = images.shape[1:3]
    _check_aspect(name, width, height)
    pixels = images.detach().float().movedim(-1, 1).clone()  # (B, C, H, W)
    if masks is True:
        if pixels.shape[1] == 3:
            raise ValueError(f"masks of the alpha channel are asked for, but {name} has none; connect masks")
        masks = pixels[:, 3]
    elif isinstance(masks, Tensor):
        masks = _counting(masks, images.shape[:3], invert_masks)
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:]
        pixels = pixels[:, :3] * alpha + (1 - alpha)
    masks = masks.detach().float().unsqueeze(1).clone() if isinstance(masks, Tensor) else None  # (B, 1, H, W)
    if size is not None:
        target = _nearest(as_sizes(size), width, height)
        pixels = _fit(pixels, target, "bicubic")
        masks = None if masks is None else _fit(masks, target, "bilinear").clamp(0, 1)
    return list(pixels.clamp(0, 1)), None if masks is None else list(masks)


def _counting(masks: Tensor, shape: tuple[int, ...], inverted: bool) -> Tensor:
    """MASK, 1 where the loss counts; `inverted`, or for one picture without its batch, it is made so."""
    masks = masks.unsqueeze(0) if masks.ndim == 2 else masks
    opaque = tuple(masks.shape[1:]) == _OPAQUE != tuple(shape[1:]) and not bool(masks.any())
    if inverted:
        masks = torch.ones(shape) if opaque else 1 - masks
    if tuple(masks.shape) != tuple(shape):
        hint = "; Load Image gives an empty 64x64 for a picture without transparency: invert masks" if opaque else ""
        raise ValueError(f"masks is {tuple(masks.shape)}, but for these images it takes {tuple(shape)}{hint}")
    return masks


def as_sizes(size: Sizes) -> list[tuple[int, int]]:
    """The (height, width) sizes that `size` stands for."""
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

    def how_far(size: tuple[int, int]) -> tuple[float, int]:
        sides = size[1] * height, size[0] * width  # a ratio of whole numbers, which a page's script gets in every bit
        return max(sides) / min(sides), -size[0] * size[1]

    return min(sizes, key=how_far)


def _box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest part about the centre that has the aspect ratio of (height, width)."""
    inner_width = max(1, min(width, round(height * size[1] / size[0])))
    inner_height = max(1, min(height, round(width * size[0] / size[1])))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def cut(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The (height, width) that a picture is trained at, and the part of it that is resized to that."""
    size = _nearest(sizes, width, height)
    return size, _box(width, height, size)


def _fit(batch: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(B, C, H, W) cut about the centre and resized to (B, C, *size)."""
    left, top, right, bottom = _box(batch.shape[3], batch.shape[2], size)
    batch = batch[:, :, top:bottom, left:right]
    return batch if batch.shape[2:] == size else interpolate(batch, size, mode=mode, antialias=True)


def grey(mask: Image) -> Image:
    """How much counts, in mode L, of a mask that is white where the loss does."""
    return mask.convert("L")


def read_reference(
    file: Path, sizes: list[tuple[int, int]], mask_file: Path | None, counts: Callable[[Image], Image] = grey
) -> tuple[Tensor, Tensor | None]:
    """A picture, (3, h, w), and its mask, (1, h, w): that of the file, or its alpha channel if it has one.

    Args:
        counts: of an opened mask, how much counts (mode L).

    Raises:
        ValueError: naming what cannot be read, a picture longer than 4:1, or a mask of another size.
    """
    from PIL import Image

    picture, mask = open_picture(file), None
    _check_aspect(f"picture {shown(file)}", *picture.size)
    if picture.mode == "RGBA":
        mask = picture.getchannel("A")
        picture = over_white(picture)
    if mask_file is not None:
        mask = counts(open_picture(mask_file))
        if mask.size != picture.size:
            raise ValueError(
                f"mask {shown(mask_file)} is {mask.width}x{mask.height}, but it takes "
                f"{picture.width}x{picture.height}, the size of {shown(file.name)}"
            )
    (height, width), box = cut(*picture.size, sizes)
    if box[2] - box[0] < width or box[3] - box[1] < height:
        logger.warning("%s is %dx%d, and is enlarged to %dx%d", shown(file), *picture.size, width, height)
    # Cut first: a resize of a box would let in what is outside of it.
    pixels = to_tensor(picture.crop(box).resize((width, height), Image.Resampling.LANCZOS))
    if mask is None:
        return pixels, None
    return pixels, to_tensor(mask.crop(box).resize((width, height), Image.Resampling.BILINEAR))


def over_white(picture: Image) -> Image:
    """A picture as `open_picture` gives it, in RGB."""
    from PIL import Image

    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def to_tensor(picture: Image) -> Tensor:
    """(C, H, W) in [0, 1]."""
    import numpy

    array = torch.from_numpy(numpy.array(picture))
    return array.view(picture.height, picture.width, -1).movedim(-1, 0).float() / 255


def as_picture(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to uint8 (H, W, 3)."""
    return (picture.clamp(0, 1).movedim(0, -1).cpu().numpy() * 255).round().astype(np.uint8)
