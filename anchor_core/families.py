"""The families of models that have training options of their own, by the name that both backends give them."""

from __future__ import annotations

FAMILIES = (
    "sd1", "sd2", "sdxl", "sd3", "flux", "flux2", "z_image", "qwen_image", "chroma", "lumina2", "wan", "sandbox",
)  # fmt: skip

_UNETS = {768: "sd1", 1024: "sd2", 128: "sandbox"}


def unet_family(width: int | None) -> str:
    """Of a UNet that is conditioned on the text of one CLIP alone, by the width of that; others count as SD1.x."""
    return _UNETS.get(width, "sd1")
