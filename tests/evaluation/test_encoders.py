"""Picture and text encoders: what transformers gives, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from anchor_core.evaluation.encoders import Clip, Dino, open_encoders, preprocess


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    """A smooth picture (3, H, W) on 8 bits, so that a file holds it exactly."""
    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).round() / 255


def test_preprocessing_is_that_of_clips_own_processor():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor()
    for height, width in ((300, 260), (150, 334), (224, 224)):  # of even margins: torchvision rounds half up
        given = picture(height, width, seed=height)
        image = Image.fromarray((given.movedim(0, -1) * 255).round().to(torch.uint8).numpy())
        expected = torch.as_tensor(processor(image, return_tensors="np")["pixel_values"][0])
        ours = preprocess(given, 224, 224, processor.image_mean, processor.image_std)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_clip_gives_what_the_model_gives(encoder_folders):
    clip = Clip.from_pretrained(encoder_folders / "clip")
    pictures = [picture(40, 60, 1), picture(32, 32, 2)]
    prompts = ["a photo of a dog", "a cat in the snow"]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    inputs = torch.stack([preprocess(each, 32, 32, mean, std) for each in pictures])
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.network(pixel_values=inputs, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    for ours, theirs in ((clip(pictures), out.image_embeds), (clip.text(prompts), out.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=-1), theirs)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino_is_the_class_token_of_every_picture(encoder_folders, name):
    dino = Dino.from_pretrained(encoder_folders / name)
    pictures = [picture(50, 40, seed) for seed in range(3)]
    together = dino(pictures)
    assert together.shape == (3, 16)
    torch.testing.assert_close(together[1], dino(pictures[1:2])[0])
    # After the last layer norm, whose weights are at their start: every row has mean 0 and deviation 1.
    torch.testing.assert_close(together.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.var(1, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_a_file_in_half_precision_is_computed_with_in_full(encoder_folders, tmp_path):
    from transformers import ViTModel

    ViTModel.from_pretrained(encoder_folders / "dino", add_pooling_layer=False).half().save_pretrained(tmp_path)
    pictures = [picture(28, 28, 0)]
    half, full = (Dino.from_pretrained(folder)(pictures) for folder in (tmp_path, encoder_folders / "dino"))
    torch.testing.assert_close(half, full, atol=2e-2, rtol=0)


def test_other_models_are_refused_in_one_line(encoder_folders, tmp_path):
    for opened, message in (
        (lambda: open_encoders(encoder_folders / "dino", None), "model of type vit, but it takes"),
        (lambda: open_encoders(None, encoder_folders / "clip"), "model of type clip, but it takes"),
        (lambda: open_encoders(tmp_path, None), "cannot be opened"),
        (lambda: open_encoders(None, None), "takes one at least"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            opened()
        assert "\n" not in str(caught.value)


def test_a_model_without_some_of_its_weights_is_refused(encoder_folders, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((encoder_folders / "dino/config.json").read_bytes())
    tensors = load_file(encoder_folders / "dino/model.safetensors")
    removed = tensors.pop("layernorm.weight")
    assert removed.shape == (16,)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights \(layernorm.weight\)"):
        Dino.from_pretrained(tmp_path)
