"""ComfyUI's lists of images, with their texts and masks, as one set of references."""

from __future__ import annotations

import pytest
import torch

from anchor_core.data.pictures import bucket_sizes, from_images


def images(*sizes: tuple[int, int, int], channels: int = 3) -> list[torch.Tensor]:
    """Batches (B, H, W, C) of seeded values."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((*size, channels), generator=generator) for size in sizes]


def test_a_list_of_batches_of_several_sizes_is_one_set():
    batches = images((1, 16, 24), (2, 24, 16), (1, 16, 24))
    references = from_images(batches, captions=["one (a:1.2)", r"two \(b\)", "three", " four\n4 "])
    assert references.names == ["image 1", "image 2", "image 3", "image 4"]
    assert references.captions == ["one (a:1.2)", "two (b)", "three", "four 4"]
    for picture, image in zip(references.pixels, [image for batch in batches for image in batch]):
        assert torch.equal(picture, image.movedim(-1, 0))
    assert torch.equal(from_images(batches[:1]).stack(), from_images(batches[0]).stack())
    sizes = {picture.shape[1:] for picture in from_images(batches, bucket_sizes(64, 16)).pixels}
    assert sizes == {(48, 80), (80, 48)}


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "images holds no picture"),
        ([torch.zeros(0, 8, 8, 3)], {}, "images holds no picture"),
        (images((1, 8, 8), (1, 8, 40)), {}, "images 2 is 40x8, of aspect ratio 5:1"),
        ([*images((1, 8, 8)), torch.full((1, 8, 8, 3), torch.nan)], {}, "images 2 holds NaN"),
        (images((2, 8, 8)), {"captions": ["one"]}, "captions has 1 entries, but it takes one for each of 2"),
        (
            images((1, 8, 8), (1, 8, 8)),
            {"masks": torch.ones(1, 8, 8)},
            "masks has 1 batches, but it takes one for each",
        ),
        (images((1, 8, 8)), {"masks": torch.ones(1, 9, 8)}, "masks is (1, 9, 8), but for these images it takes"),
        (images((1, 8, 8)), {"masks": torch.zeros(1, 8, 8)}, "mask of image 1 is empty"),
        (images((1, 8, 8)), {"masks": torch.ones(1, 8, 8), "invert_masks": True}, "mask of image 1 is empty"),
        (images((1, 8, 8)), {"masks": torch.zeros(1, 64, 64)}, "Load Image gives an empty 64x64 for a picture without"),
    ],
)
def test_what_does_not_fit_is_named(batches, options, message):
    with pytest.raises(ValueError) as caught:
        from_images(batches, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_masks_of_load_image_are_inverted(caplog):
    """Its MASK is 1 - alpha, and zeros of 64 x 64 for a picture that has none."""
    batches, alpha = images((1, 16, 16), (1, 24, 16)), torch.zeros(1, 16, 16)
    alpha[..., :4] = 1
    with caplog.at_level("INFO"):
        references = from_images(batches, masks=[1 - alpha, torch.zeros(1, 64, 64)], invert_masks=True)
    assert torch.equal(references.masks[0], alpha) and references.masks[1].eq(1).all()
    assert references.masks[1].shape == (1, 24, 16) and "counts in 62 % of the pixels of images" in caplog.text
    assert torch.equal(from_images(batches[0], masks=alpha[0]).masks[0], alpha)  # a MASK without its batch
    square = from_images(images((1, 64, 64)), masks=torch.zeros(1, 64, 64), invert_masks=True)
    assert square.masks[0].eq(1).all()
