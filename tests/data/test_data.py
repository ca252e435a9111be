from __future__ import annotations

import pytest
import torch
from PIL import Image

from anchor_core.concept import Concept
from anchor_core.data.cache import Cache
from anchor_core.data.captions import check_captions, prompt_pairs
from anchor_core.data.pictures import References, bucket_sizes, from_images, load_references
from anchor_core.data.prepare import build_dataset, sample_class_latents


def picture(path, color="red", size=(20, 20), **options):
    Image.new("RGB", size, color).save(path, **options)


def color_of(pixels: torch.Tensor) -> list[int]:
    return (pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2] * 255).round().int().tolist()


def test_natural_order_and_suffixes(tmp_path):
    for name in ("10.png", "2.png", "a.JPG", "1.webp", "b3.bmp"):
        picture(tmp_path / name)
    (tmp_path / "caption.txt").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    references = load_references(tmp_path, 8)
    assert references.names == ["1.webp", "2.png", "10.png", "a.JPG", "b3.bmp"]
    assert len(references) == 5 and references.stack().shape == (5, 3, 8, 8)
    assert references.stack().dtype == torch.float32


def test_centre_crop_and_resize(tmp_path):
    wide = Image.new("RGB", (60, 20), "blue")
    wide.paste("red", (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    (pixels,) = load_references(tmp_path, 10).pixels
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert torch.equal(pixels, red.expand(3, 10, 10))


def test_exif_orientation(tmp_path):
    stored = Image.new("RGB", (16, 16), "blue")
    stored.paste("red", (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    stored.save(tmp_path / "turned.png", exif=exif)
    (pixels,) = load_references(tmp_path, 16).pixels
    assert pixels[:, 2, 8].tolist() == [0, 0, 1] and pixels[:, 13, 8].tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    if mode == "P":
        clear = Image.new("P", (8, 8), 0)
        clear.putpalette([0, 0, 0] * 256)
        clear.save(tmp_path / "clear.png", transparency=0)
    else:
        clear.convert(mode).save(tmp_path / "clear.png")
    (pixels,) = load_references(tmp_path, 8).pixels
    assert color_of(pixels) == [255, 255, 255]


def test_grey_becomes_rgb(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    assert color_of(load_references(tmp_path, 8).pixels[0]) == [51, 51, 51]


def test_unreadable_pictures_are_named_in_one_line(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"2\.png cannot be read") as caught:
        load_references(tmp_path, 8)
    assert "\n" not in str(caught.value)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"2\.png cannot be read"):
        load_references(tmp_path, 8)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        load_references(tmp_path, 8)
    with pytest.raises(ValueError, match="is no folder"):
        load_references(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match="^size is 0"):
        load_references(tmp_path, 0)
    with pytest.raises(ValueError, match="holds no picture"):
        References([], [])
    with pytest.raises(ValueError, match="holds no picture"):
        from_images(torch.zeros(0, 8, 8, 3))


def test_from_images(tmp_path):
    images = torch.zeros(2, 6, 12, 4)
    images[0, :, 3:9, 0] = 1  # red, inside the centre square
    images[0, ..., 3] = 1
    references = from_images(images, size=4)
    assert references.stack().shape == (2, 3, 4, 4)
    torch.testing.assert_close(references.pixels[0], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 4))
    torch.testing.assert_close(references.pixels[1], torch.ones(3, 4, 4))
    kept = torch.rand(1, 6, 12, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_images(kept).pixels[0], kept[0].movedim(-1, 0))
    with pytest.raises(ValueError, match="^images is"):
        from_images(torch.zeros(3, 8, 8))
    for odd, told in (
        (torch.full((1, 8, 8, 3), torch.inf), "class_images holds NaN or infinite"),  # not white
        (torch.full((1, 8, 8, 4), torch.nan), "class_images holds NaN or infinite"),
        (torch.zeros(0, 8, 8, 3), "class_images holds no picture"),
        (torch.zeros(1, 8, 8, 2), "class_images is"),
    ):
        with pytest.raises(ValueError, match=f"^{told}"):
            from_images(odd, name="class_images")


def test_references_check_what_they_hold():
    with pytest.raises(ValueError, match="reference a is"):
        References([torch.zeros(1, 4, 4)], ["a"])
    with pytest.raises(ValueError, match="reference b holds NaN"):
        References([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)], ["a", "b"])
    with pytest.raises(ValueError, match="one size is needed"):
        References([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], ["a", "b"]).stack()


def test_concept_tidies_its_prompts():
    concept = Concept("  a photo of  a sks dog ", "a photo of a dog")
    assert concept.subject_prompt == "a photo of a sks dog"


@pytest.mark.parametrize(
    ("subject", "class_", "message"),
    [
        ("", "a dog", "^subject_prompt is ''"),
        ("a sks dog", "", "^class_prompt is ''"),
        ("a sks dog", "   ", "^class_prompt is '   '"),
        (None, "a dog", "^subject_prompt is None"),
        ("a sks dog", 3, "^class_prompt is 3"),
        ("a dog", "a dog", "^class_prompt is 'a dog', the same as subject_prompt"),
        ("A dog", "a  dog ", "^class_prompt is 'a dog', the same as subject_prompt"),
    ],
)
def test_bad_concepts_are_named(subject, class_, message):
    with pytest.raises(ValueError, match=message) as caught:
        Concept(subject, class_)
    assert "\n" not in str(caught.value)


def test_class_latents_are_the_pretrained_networks(eps_denoiser, concept, stir):
    from anchor_core.adapters.config import AdapterConfig

    options = {"seed": 4, "steps": 2, "batch_size": 2}
    untouched = sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **options)
    assert untouched.shape == (3, 4, 8, 8)
    stir(eps_denoiser.attach(AdapterConfig(rank=2)))
    assert torch.equal(sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **options), untouched)
    other = sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **{**options, "seed": 5})
    assert not torch.equal(other, untouched)


def test_class_latents_are_made_once_for_a_network_and_a_sampling(eps_denoiser, concept, tmp_path, monkeypatch):
    def made(**changes) -> torch.Tensor:
        options = {"count": 2, "shape": (4, 8, 8), "steps": 3, "guidance": 3.0, **changes}
        return sample_class_latents(eps_denoiser, concept, cache=Cache(eps_denoiser, tmp_path), **options)

    first = made()
    sample = eps_denoiser.sample
    asked = []

    def counted(*given, **how):
        asked.extend([how] if how["steps"] == 3 else [])
        return sample(*given, **how)

    monkeypatch.setattr(eps_denoiser, "sample", counted)
    assert torch.equal(made(), first) and not asked
    assert not torch.equal(made(seed=1), first) and not torch.equal(made(guidance=4.0), first) and len(asked) == 2
    with torch.no_grad():
        next(eps_denoiser.network.parameters()).add_(0.1)
    assert not torch.equal(made(), first) and len(asked) == 3


def test_class_latents_of_another_schedule_are_made_anew(eps_denoiser, concept, tmp_path):
    """The network is the same, and so is what it says, but not the way of a sample through its noise levels."""
    own = eps_denoiser
    scheduler = type(own.scheduler).from_config(own.scheduler.config, beta_end=0.02)
    other = type(own)(own.network, own.text_encoder, own.tokenizer, own.vae, scheduler)
    options = {"count": 1, "shape": (4, 8, 8), "steps": 3}
    first, second = (sample_class_latents(d, concept, cache=Cache(d, tmp_path), **options) for d in (own, other))
    assert not torch.equal(first, second)
    assert torch.equal(second, sample_class_latents(other, concept, **options))


# --- masks ------------------------------------------------------------------------------------------------------------


def half_clear(path, size=(20, 20)):
    """Red and opaque on the left, transparent on the right."""
    image = Image.new("RGBA", size, (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    image.save(path)


def test_alpha_is_laid_over_white_and_taken_as_the_mask(tmp_path):
    half_clear(tmp_path / "1.png")
    references = load_references(tmp_path, 20, masks=True)
    assert references.masks[0].shape == (1, 20, 20)
    assert references.masks[0][0, :, :10].eq(1).all() and references.masks[0][0, :, 10:].eq(0).all()
    assert references.pixels[0][:, 3, 15].tolist() == [1, 1, 1] and references.pixels[0][:, 3, 5].tolist() == [1, 0, 0]
    assert load_references(tmp_path, 20).masks is None


def test_a_mask_file_goes_before_alpha_and_is_no_picture(tmp_path):
    half_clear(tmp_path / "1.png")
    picture(tmp_path / "2.jpg")
    for name in ("1-masklabel.png", "2-masklabel.png"):
        mask = Image.new("L", (20, 20), 0)
        mask.paste(255, (0, 0, 20, 10))
        mask.save(tmp_path / name)
    references = load_references(tmp_path, 20, masks=True)
    assert references.names == ["1.png", "2.jpg"] == load_references(tmp_path, 20).names
    for mask in references.masks:
        assert mask[0, :10].eq(1).all() and mask[0, 10:].eq(0).all()


def test_masks_are_cut_and_resized_like_their_pictures(tmp_path):
    image = Image.new("RGBA", (60, 20), (255, 255, 255, 0))
    image.paste((255, 0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "1.png")
    references = load_references(tmp_path, 10, masks=True)
    assert references.masks[0].eq(1).all() and references.pixels[0][1:].eq(0).all()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda f: (half_clear(f / "1.png"), picture(f / "2.png")),
            r"2\.png has neither .* 2-masklabel\.png, while 1\.",
        ),
        (lambda f: picture(f / "1.png"), r"1\.png has neither an alpha channel nor a 1-masklabel\.png; give"),
        (lambda f: Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(f / "1.png"), r"^mask of 1\.png is empty"),
        (
            lambda f: (picture(f / "1.png"), picture(f / "1-masklabel.png", size=(10, 20))),
            r"1-masklabel\.png is 10x20, but it takes 20x20",
        ),
        (
            lambda f: (picture(f / "1.png"), (f / "1-masklabel.png").write_bytes(b"no")),
            r"1-masklabel\.png cannot be read",
        ),
    ],
)
def test_bad_masks_are_named(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_references(tmp_path, 8, masks=True)
    assert "\n" not in str(caught.value)


def test_masks_of_image_batches():
    images, masks = torch.rand(2, 6, 12, 3), torch.zeros(2, 6, 12)
    masks[:, :, 3:9] = 1
    references = from_images(images, 6, masks)
    assert len(references.masks) == 2 and all(mask.eq(1).all() for mask in references.masks)
    clear = torch.cat([images, masks.unsqueeze(-1)], dim=-1)
    assert torch.equal(from_images(clear, masks=True).masks[1][0], masks[1])
    assert from_images(clear).masks is None
    with pytest.raises(ValueError, match=r"^masks is \(1, 6, 12\), but for these images it takes \(2, 6, 12\)"):
        from_images(images, masks=masks[:1])
    with pytest.raises(ValueError, match="^masks of the alpha channel are asked for, but images has none"):
        from_images(images, masks=True)
    for value, told in ((0, "is empty"), (torch.nan, "has NaN or values out of"), (2, "has NaN or values out of")):
        masks[1] = value
        with pytest.raises(ValueError, match=f"^mask of image 2 {told}"):
            from_images(images, masks=masks)
    with pytest.raises(ValueError, match="^masks has 1 entries, but it takes one for each of 2"):
        References([torch.zeros(3, 4, 4)] * 2, ["a", "b"], [torch.ones(1, 4, 4)])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 64), (64, 16)])
def test_bucket_sizes(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and (resolution * 2, resolution // 2) in sizes
    assert len(set(sizes)) == len(sizes) and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert resolution**2 - max(height, width) * multiple < height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)


def test_bucket_sizes_are_those_of_sd_scripts():
    assert {(768, 320), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640)} < set(bucket_sizes(512, 64))
    with pytest.raises(ValueError, match="^resolution is 500, but aspect buckets take a multiple of 64"):
        bucket_sizes(500, 64)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1000, 1000), (64, 64)), ((900, 600), (48, 80)), ((30, 40), (80, 48)), ((400, 100), (32, 128))],
)
def test_pictures_take_the_nearest_bucket(tmp_path, size, bucket):
    picture(tmp_path / "1.png", size=size)
    (pixels,) = load_references(tmp_path, bucket_sizes(64, 16)).pixels
    assert pixels.shape[1:] == bucket
    images = torch.zeros(1, size[1], size[0], 3)
    assert from_images(images, bucket_sizes(64, 16)).pixels[0].shape[1:] == bucket


def test_of_buckets_as_near_the_larger_is_taken(tmp_path):
    picture(tmp_path / "1.png", size=(20, 20))
    for sizes in ([(8, 8), (16, 16)], [(16, 16), (8, 8)]):
        assert load_references(tmp_path, sizes).pixels[0].shape == (3, 16, 16)


def test_a_bucket_covers_and_keeps_the_aspect_ratio(tmp_path):
    # A square of 20 in a picture of 100 x 60: at 64 x 32 the cut is 100 x 50 and the scale 0.64.
    image = Image.new("RGB", (100, 60), "blue")
    image.paste("red", (40, 20, 60, 40))
    image.save(tmp_path / "1.png")
    (pixels,) = load_references(tmp_path, [(32, 64)]).pixels
    red = (pixels[0] > 0.5).nonzero()
    extent = (red.max(0).values - red.min(0).values + 1).tolist()
    assert pixels.shape == (3, 32, 64) and all(abs(edge - 12.8) <= 1 for edge in extent)


def test_smaller_pictures_are_enlarged_and_told(tmp_path, caplog):
    picture(tmp_path / "1.png", size=(20, 20))
    load_references(tmp_path, 20)
    assert not caplog.records
    load_references(tmp_path, 24)
    assert "1.png is 20x20, and is enlarged to 24x24" in caplog.text


@pytest.mark.parametrize("size", [8, [(8, 8), (4, 16)]])
def test_long_pictures_are_named(tmp_path, size):
    picture(tmp_path / "1.png", size=(20, 80))
    load_references(tmp_path, size)
    picture(tmp_path / "2.png", size=(1, 5000))
    with pytest.raises(ValueError, match=r"2\.png is 1x5000, of aspect ratio 5000:1, but it takes at most 4:1"):
        load_references(tmp_path, size)
    with pytest.raises(ValueError, match=r"^images is 1x5000, of aspect ratio 5000:1"):
        from_images(torch.zeros(1, 5000, 1, 3))


def test_pictures_of_16_bits_keep_their_greys(tmp_path):
    import numpy

    Image.fromarray(numpy.full((8, 8), 51 * 256 + 7, dtype=numpy.uint16)).save(tmp_path / "grey.png")
    assert color_of(load_references(tmp_path, 8).pixels[0]) == [51, 51, 51]


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "class_", "phrases"),
    [
        ("a photo of a sks dog", "a photo of a dog", ("sks dog", "dog")),
        ("a photo of sks", "a photo of a dog", ("sks", "a dog")),
        ("a sks stuffed animal in the snow", "a stuffed animal in the snow", ("sks stuffed animal", "stuffed animal")),
        ("a photo of a dog sks", "a photo of a dog", ("dog sks", "dog")),
        ("sks dog, best quality", "Dog, best quality", ("sks dog", "Dog")),
        ("photo of <new1> cat", "photo of cat", ("<new1> cat", "cat")),
        ("a photo of a corgi", "a photo of a dog", ("corgi", "dog")),
    ],
)
def test_phrases_are_what_the_prompts_differ_in(subject, class_, phrases):
    concept = Concept(subject, class_)
    assert (concept.subject_phrase, concept.class_phrase) == phrases
    assert concept.class_of(subject) == class_


def test_concept_from_words():
    concept = Concept.from_words(" sks ", "stuffed  animal", "a {} in the snow")
    assert concept.subject_prompt == "a sks stuffed animal in the snow"
    assert concept.class_prompt == "a stuffed animal in the snow"
    assert concept.class_of("A Sks  stuffed animal's hat") == "A stuffed animal's hat"
    for words, message in [
        (("", "dog"), "^token is ''"),
        (("sks", " "), "^class_word is ' '"),
        (("sks", "dog", "a photo"), "^template is 'a photo', but it takes a text with one {}"),
        (("sks", "dog", "{} {}"), "^template is "),
    ]:
        with pytest.raises(ValueError, match=message):
            Concept.from_words(*words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a photo of a sks dog", "a photo of a"), "^class_prompt is 'a photo of a', but it takes the class word too"),
        (("a sks dog in the snow", "a in the snow"), "^class_prompt is 'a in the snow', but it takes the class word"),
        (("a dog", "a sks dog"), "^subject_prompt is 'a dog', but it takes a rare word that class_prompt"),
        (("a sks dog", "an animal", "sks dog", "dog"), "^class_prompt is 'an animal', but it takes .* 'dog'"),
        (("a xyz dog", "a dog", "sks dog", "dog"), "^subject_prompt is 'a xyz dog', but it takes .* 'sks dog'"),
    ],
)
def test_prompts_without_their_words_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Concept(*values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"1\.txt is empty"),
        (" \n", r"1\.txt is empty"),
        (b"\xff\xfe\xff", r"1\.txt cannot be read \(it is not UTF-8\)"),
        (None, r"1\.png has no caption; write one into 1\.txt"),
    ],
)
def test_bad_caption_files_are_named(tmp_path, text, message):
    picture(tmp_path / "1.png")
    if text is not None:
        (tmp_path / "1.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_references(tmp_path, 8, captions=True)
    assert load_references(tmp_path, 8).captions is None


def test_captions_beside_their_pictures(tmp_path, concept):
    for name, text in (("10", "a sks dog\nin snow "), ("2", "\ufeffsks dog")):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    references = load_references(tmp_path, 8, captions=True)
    assert references.captions == ["sks dog", "a sks dog in snow"]
    pairs = prompt_pairs(concept, references.names, references.captions)
    assert pairs == [[("sks dog", "dog")], [("a sks dog in snow", "a dog in snow")]]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a dog", "^caption of b is 'a dog', which does not name the subject; write 'sks dog'"),
        ("two sks dogs", "^caption of b is 'two sks dogs', which does not name the subject"),
        ("a sks dog, sks", "^caption of b is 'a sks dog, sks', but it takes 'sks' only as a part of 'sks dog'"),
    ],
)
def test_captions_that_do_not_name_the_subject(concept, caption, message):
    with pytest.raises(ValueError, match=message):
        prompt_pairs(concept, ["a", "b"], ["a sks dog", caption])


def test_templates_and_plain_prompts(concept):
    assert prompt_pairs(concept, ["a", "b"]) == [[("a photo of a sks dog", "a photo of a dog")]] * 2
    pairs = prompt_pairs(concept, ["a"], templates=["{} in snow", "a {}"])
    assert pairs == [[("sks dog in snow", "dog in snow"), ("a sks dog", "a dog")]]
    with pytest.raises(ValueError, match="^template is 'a dog'"):
        prompt_pairs(concept, ["a"], templates=["a dog"])
    with pytest.raises(ValueError, match="^templates are given, but the pictures have captions"):
        prompt_pairs(concept, ["a"], ["sks dog"], templates=["a {}"])


def test_shuffled_captions_keep_their_pairs(concept):
    caption = "sks dog, snow, red hat, night, old"
    (pairs,) = prompt_pairs(concept, ["a"], [caption], shuffle=True)
    assert pairs[0] == (caption, caption.replace("sks ", "")) and len(set(pairs)) == 8
    for subject, class_ in pairs:
        assert sorted(subject.split(", ")) == sorted(caption.split(", ")) and class_ == subject.replace("sks ", "")
    assert prompt_pairs(concept, ["z"], [caption], shuffle=True) == [pairs]
    assert prompt_pairs(concept, ["a"], [caption], shuffle=True, seed=1) != [pairs]
    assert len(prompt_pairs(concept, ["a"], ["sks dog, a, b"], shuffle=True)[0]) == 6
    assert len(prompt_pairs(concept, ["a"], ["sks dog, a, a, a"], shuffle=True)[0]) == 4
    assert prompt_pairs(concept, ["a"], shuffle=True) == [[("a photo of a sks dog", "a photo of a dog")]]


def test_long_captions_are_named(eps_denoiser):
    def count(text: str) -> int:
        return len(eps_denoiser.tokenizer(text).input_ids)

    check_captions({"a.txt": "dog " * 75}, count, 77)
    with pytest.raises(ValueError, match=r"^caption of b\.txt has 78 tokens, but the text encoder takes 77"):
        check_captions({"a.txt": "dog", "b.txt": "dog " * 76}, count, 77)


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_build_dataset(eps_denoiser, concept):
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, h, w, generator=generator) for h, w in ((16, 16), (16, 24), (16, 16))]
    masks = [torch.zeros(1, *picture.shape[1:]) for picture in pixels]
    for mask in masks:
        mask[:, :8, :3] = 1
    references = References(pixels, ["a", "b", "c"], masks, ["sks dog", "a sks dog", "sks dog, snow"])
    dataset = build_dataset(eps_denoiser, references, concept, flip=True, shuffle=True, caption_dropout=0.1)
    for example, picture in zip(dataset.examples, pixels):
        own, mirrored = eps_denoiser.encode_images(torch.stack([picture, picture.flip(-1)]))
        torch.testing.assert_close(example.latents, own)
        torch.testing.assert_close(example.flipped, mirrored)
        assert example.mask.shape == (1, *own.shape[1:]) and example.mask[0, 0, :3].tolist() == [1, 0.5, 0]
    assert [example.name for example in dataset.examples] == ["a", "b", "c"]
    assert dataset.examples[2].subject_prompts == ("sks dog, snow", "snow, sks dog")
    assert dataset.examples[2].class_prompts == ("dog, snow", "snow, dog")
    assert dataset.prompts()[-1] == "" and dataset.caption_dropout == 0.1


def test_build_dataset_refuses_before_it_encodes(concept):
    references = References([torch.rand(3, 16, 16)], ["a"], captions=["a dog"])
    with pytest.raises(ValueError, match="^caption of a is 'a dog'"):
        build_dataset(None, references, concept)
    with pytest.raises(ValueError, match="^caption_dropout is 1"):
        build_dataset(None, references, concept, caption_dropout=1)


def test_a_caption_longer_than_the_text_encoder_reads_is_named_before_any_encoding(eps_denoiser, concept, monkeypatch):
    from anchor_core.data.pictures import References
    from anchor_core.data.prepare import build_dataset

    monkeypatch.setattr(eps_denoiser, "encode_images", lambda pixels: pytest.fail("pictures were encoded"))
    captions = ["a photo of a sks dog", "a photo of a sks dog " + "in the snow " * 40]
    references = References([torch.rand(3, 16, 16) for _ in captions], ["1.png", "2.png"], captions=captions)
    with pytest.raises(ValueError, match=r"^caption of 2.png has \d+ tokens, but the text encoder takes 77; shorten"):
        build_dataset(eps_denoiser, references, concept)
