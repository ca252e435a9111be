from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from anchor_core.data.cache import Cache


@pytest.fixture
def pictures() -> list[torch.Tensor]:
    """Three pictures of two sizes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h, w, generator=generator) for h, w in ((16, 16), (16, 24), (16, 16))]


@pytest.fixture
def calls(eps_denoiser, monkeypatch) -> dict[str, list]:
    """What the denoiser's encoders, which still do their work, were asked for."""
    made: dict[str, list] = {"images": [], "prompts": []}
    encode_images, encode_prompt = eps_denoiser.encode_images, eps_denoiser.encode_prompt

    def count_images(pixels):
        made["images"].append(tuple(pixels.shape))
        return encode_images(pixels)

    def count_prompt(prompt, adapted=False):
        made["prompts"].append(prompt)
        return encode_prompt(prompt, adapted)

    monkeypatch.setattr(eps_denoiser, "encode_images", count_images)
    monkeypatch.setattr(eps_denoiser, "encode_prompt", count_prompt)
    return made


PROBE = (1, 3, 64, 64)


def test_latents_are_the_encoders_and_made_once(eps_denoiser, pictures, calls):
    expected = [eps_denoiser.encode_images(picture.unsqueeze(0))[0] for picture in pictures]
    calls["images"].clear()
    cache = Cache(eps_denoiser)
    latents = cache.latents(pictures)
    torch.testing.assert_close(latents, expected)
    assert all(each.dtype == torch.float32 and each.device.type == "cpu" for each in latents)
    assert calls["images"] == [(1, *picture.shape) for picture in pictures]
    again = cache.latents([pictures[2], pictures[2].clone(), pictures[0]])
    assert torch.equal(again[0], latents[2]) and torch.equal(again[1], latents[2]) and torch.equal(again[2], latents[0])
    assert len(calls["images"]) == 3


def test_disk_is_read_by_the_next_run(eps_denoiser, pictures, calls, tmp_path):
    folder = tmp_path / "deep" / "cache"
    latents = Cache(eps_denoiser, folder).latents(pictures)
    condition = Cache(eps_denoiser, folder).condition("a dog")
    for made in calls.values():
        made.clear()
    cache = Cache(eps_denoiser, folder)
    for one, other in zip(cache.latents(pictures), latents):
        assert torch.equal(one, other)
    assert torch.equal(cache.condition("a dog"), condition)
    assert calls["images"] == [PROBE] and "a dog" not in calls["prompts"]
    assert {file.suffix for file in folder.iterdir()} == {".safetensors"}
    assert len(list(folder.iterdir())) == 4


def test_other_pictures_and_models_are_other_entries(eps_denoiser, pictures, calls, tmp_path):
    first = Cache(eps_denoiser, tmp_path)
    latents, condition = first.latents(pictures), first.condition("a dog")
    changed = pictures[0].clone()
    changed[0, 0, 0] += 1e-3
    assert not torch.equal(first.latents([changed])[0], latents[0])
    turned = pictures[1].reshape(3, 24, 16)  # the same values in another shape
    assert first.latents([turned])[0].shape != latents[1].shape
    # The very last weights: whatever of the encoder changes, its fingerprint does.
    with torch.no_grad():
        eps_denoiser.vae.quant_conv.bias += 0.01
        list(eps_denoiser.text_encoder.parameters())[-1].add_(0.01)
    calls["images"].clear()
    second = Cache(eps_denoiser, tmp_path)
    assert not torch.equal(second.latents(pictures)[0], latents[0])
    assert not torch.equal(second.condition("a dog"), condition)
    eps_denoiser.vae.register_to_config(scaling_factor=0.5)
    assert not torch.equal(Cache(eps_denoiser, tmp_path).latents(pictures)[0], second.latents(pictures)[0])
    assert len(list(tmp_path.glob("latents-*"))) == 3 + 2 + 3 + 3
    assert len(list(tmp_path.glob("condition-*"))) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "bit", "folder"])
def test_damaged_entries_are_made_again(eps_denoiser, pictures, tmp_path, caplog, damage):
    latents = Cache(eps_denoiser, tmp_path).latents(pictures[:1])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        damaged = {"cut": whole[:-9], "empty": b"", "garbage": b"x" * 99, "bit": whole[:-1] + bytes([whole[-1] ^ 1])}
        file.write_bytes(damaged[damage])
    if damage == "folder":  # nothing can be put in its place
        with pytest.raises(ValueError, match="cannot be written"):
            Cache(eps_denoiser, tmp_path).latents(pictures[:1])
        file.rmdir()
    again = Cache(eps_denoiser, tmp_path).latents(pictures[:1])
    assert torch.equal(again[0], latents[0])
    assert file.name in caplog.text and "made again" in caplog.text and "\n" not in caplog.records[0].getMessage()
    caplog.clear()
    assert torch.equal(Cache(eps_denoiser, tmp_path).latents(pictures[:1])[0], latents[0]) and not caplog.records


def test_a_folder_that_cannot_be_written_is_named_at_once(eps_denoiser, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^the cache folder .*file cannot be written \(.*\); free space"):
        Cache(eps_denoiser, tmp_path / "file")
    with pytest.raises(ValueError, match=r"^the cache folder .*cannot be written"):
        Cache(eps_denoiser, tmp_path / "file" / "deeper")


def test_a_full_disk_is_one_error_and_leaves_nothing(eps_denoiser, pictures, tmp_path):
    cache = Cache(eps_denoiser, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the system refuses files longer than 100 bytes
    try:
        with pytest.raises(ValueError, match=r"^the cache folder .* cannot be written \(File too large\)"):
            cache.latents(pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_nan_latents_are_refused_and_not_kept(eps_denoiser, pictures, tmp_path):
    with torch.no_grad():
        eps_denoiser.vae.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="^the autoencoder makes NaN or infinite latents"):
        Cache(eps_denoiser, tmp_path).latents(pictures)
    assert not list(tmp_path.iterdir())


def test_conditions_are_one_object_a_prompt(eps_denoiser, calls):
    cache = Cache(eps_denoiser)
    assert cache.condition("a dog") is cache.condition("a dog")
    assert torch.equal(cache.condition("a dog"), eps_denoiser.encode_prompt("a dog"))
    assert calls["prompts"] == ["a dog", "a dog"]  # one of them is this test's own


@dataclass(eq=False)
class Compound:
    """A condition as ComfyUI's backend has it."""

    cross_attention: torch.Tensor
    extras: dict[str, Any]
    encoded: dict[tuple[int, ...], Any] = field(default_factory=dict)
    kind: str = field(default="compound", init=False)


class CompoundDenoiser:
    """The tiny model with compound conditions."""

    def __init__(self, denoiser, extra: Any = None):
        self.denoiser, self.device, self.extra, self.prompts = denoiser, denoiser.device, extra, []

    def encode_prompt(self, prompt: str):
        self.prompts.append(prompt)
        embedding = self.denoiser.encode_prompt(prompt)
        extras = {"pooled_output": embedding[-1:].half(), "guidance": 3.5, "width": 8, "name": None, "more": self.extra}
        return Compound(embedding.unsqueeze(0), extras)


def test_compound_conditions_go_to_disk_and_back(eps_denoiser, tmp_path):
    denoiser = CompoundDenoiser(eps_denoiser, {"nested": torch.arange(3), "flag": True})
    first = Cache(denoiser, tmp_path).condition("a dog")
    first.encoded[(4, 8, 8)] = "made by predict, later"
    denoiser.prompts.clear()
    second = Cache(denoiser, tmp_path).condition("a dog")
    assert type(second) is Compound and "a dog" not in denoiser.prompts and second.encoded == {}
    assert torch.equal(second.cross_attention, first.cross_attention)
    assert second.extras.keys() == first.extras.keys()
    assert second.extras["pooled_output"].dtype == torch.float16
    assert torch.equal(second.extras["pooled_output"], first.extras["pooled_output"])
    assert torch.equal(second.extras["more"]["nested"], torch.arange(3)) and second.extras["more"]["flag"] is True
    assert (second.extras["guidance"], second.extras["width"], second.extras["name"]) == (3.5, 8, None)


def test_conditions_of_another_kind_stay_in_memory(eps_denoiser, tmp_path):
    denoiser = CompoundDenoiser(eps_denoiser, object())
    cache = Cache(denoiser, tmp_path)
    assert cache.condition("a dog") is cache.condition("a dog") and not list(tmp_path.iterdir())
