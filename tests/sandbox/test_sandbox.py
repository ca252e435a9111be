"""The world, its words, the subjects, the judge and the shipped weights."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anchor_core.sandbox import captions, evaluate, judge, model, pretrain, subjects, tokenizer, world


@pytest.fixture(scope="module")
def the_judge() -> judge.Judge:
    return judge.Judge()


def test_a_scene_always_gives_the_same_picture():
    scene = world.sample_scene(random.Random(3))
    assert np.array_equal(np.asarray(world.draw(scene)), np.asarray(world.draw(scene)))
    assert not np.array_equal(
        np.asarray(world.draw(scene)), np.asarray(world.draw(replace(scene, seed=scene.seed + 1)))
    )


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_body_stays_inside_the_picture(shape):
    rng = random.Random(shape)
    for _ in range(20):
        scene = replace(world.sample_scene(rng), shape=shape, background="white", colour="blue", outline="none")
        cx, cy, radius, _ = world._layout(scene, random.Random(scene.seed))
        border = np.asarray(world.body_mask(shape, cx, cy, radius)).copy()
        border[4:-4, 4:-4] = 0
        assert border.max() == 0


def test_objects_stand_out_from_what_is_behind_them():
    rng = random.Random(0)
    for _ in range(300):
        scene = world.sample_scene(rng)
        assert world.contrast(world.COLOURS[scene.colour], world.BACKGROUNDS[scene.background]) >= 85


def test_a_complete_caption_says_everything_and_no_caption_says_sks():
    rng = random.Random(1)
    for _ in range(500):
        scene = world.sample_scene(rng)
        words = captions.caption(scene, rng, complete=True).split()
        assert scene.shape in words and scene.colour in words
        if scene.accessory != "none":
            assert scene.accessory in words and scene.accessory_colour in words
        assert not set(words) & set(tokenizer.UNUSED_TOKENS)


def test_the_tokenizer_is_lossless_and_keeps_single_tokens_for_subjects():
    clip = tokenizer.load(model.WEIGHTS / "tokenizer")
    assert clip.model_max_length == 77
    for word in tokenizer.UNUSED_TOKENS:
        assert len(clip(word, add_special_tokens=False).input_ids) == 1
    for text in ("a photo of a sks star", "zürich façade 日本 !?"):
        assert clip.decode(clip(text).input_ids, skip_special_tokens=True).strip() == text
    assert clip.unk_token_id not in clip("any ☃ text ✓ at all", add_special_tokens=False).input_ids


def test_twelve_subjects_with_references_and_prompts():
    assert len(subjects.names()) == 12
    rng = random.Random(2)
    ordinary = {world.ordinary_paint(world.sample_scene(rng)) for _ in range(2000)}
    for subject in subjects.SUBJECTS.values():
        assert 4 <= len(subject.references()) <= 6
        assert len(set(subject.surroundings)) == 2
        prompts = subject.prompts()
        assert len(prompts) == len(set(prompts)) == 25
        assert all(f"sks {subject.class_word}" in prompt for prompt in prompts)
        assert subject.paint not in ordinary
        scenes = [scene for scene in subject.prompt_scenes() if scene]
        assert len(scenes) == 20 and not {s.background for s in scenes[:10]} & set(subject.surroundings)


def test_what_each_prompt_asks_for_is_drawn():
    subject = subjects.get("rosie")
    drawn, anew = subject.drawn(), subject.drawn(1)
    assert len(drawn) == len(subject.prompts()) == 25
    assert [each.tobytes() for each in drawn] == [each.tobytes() for each in subject.drawn()]
    assert all(one.tobytes() != other.tobytes() for one, other in zip(drawn, anew))
    for number, scene in enumerate(subject.prompt_scenes()):
        if scene is not None:
            assert drawn[number] == world.draw(replace(scene, seed=number))
    own, changed = subject.paint, [np.asarray(picture).reshape(-1, 3) for picture in drawn[20:]]
    colours = dict(zip(subjects.PROPERTIES, ({tuple(map(int, pixel)) for pixel in each} for each in changed)))
    for word in ("red", "purple"):
        assert world.COLOURS[word] in colours[word] and own.colours[0] not in colours[word]
    for word in ("striped", "dotted"):  # in the subject's own colours, its face over them
        assert {*own.colours, own.outline, (255, 255, 255)} <= colours[word]
    area = dict(zip(subjects.PROPERTIES, ((each != each[0]).any(1).sum() for each in changed)))
    assert area["small"] < 0.9 * min(area["red"], area["purple"])


def test_an_unknown_subject_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'nobody'; known: pip, momo"):
        subjects.get("nobody")


def test_readers_are_right_on_fresh_drawings(the_judge):
    rng = random.Random("fresh")
    scenes = [world.sample_scene(rng) for _ in range(300)]
    readings = the_judge.read(judge.pixels(np.stack([np.asarray(world.draw(scene)) for scene in scenes])))
    for name in judge.ATTRIBUTES:
        asked = [(s, r) for s, r in zip(scenes, readings) if name != "accessory_colour" or s.accessory != "none"]
        assert np.mean([getattr(s, name) == r[name] for s, r in asked]) >= 0.95, name
    assert min(the_judge.card["accuracy"].values()) >= 0.97


def test_the_judge_tells_a_subject_from_the_others(the_judge):
    embedded = [
        the_judge.identity(judge.pixels(np.stack([np.asarray(p) for p in s.references()])))
        for s in subjects.SUBJECTS.values()
    ]
    for i, own in enumerate(embedded):
        within = (own @ own.T)[~torch.eye(len(own), dtype=torch.bool)].mean()
        across = max((own @ other.T).mean() for j, other in enumerate(embedded) if j != i)
        assert within > across + 0.2


def test_the_shipped_model_draws_what_a_caption_says(the_judge):
    """On the 500 captions of its card; and on a quick sample here, with room for its own chance."""
    card = json.loads((model.WEIGHTS / "training.json").read_text())["accuracy"]
    assert card["captions"] == 500
    assert min(card[name] for name in ("shape", "colour", "background", "accessory")) >= 0.9
    scores = evaluate.evaluate(model.WEIGHTS, the_judge, count=50, seed=7)
    for name in ("shape", "colour", "background", "accessory"):
        assert scores[name] >= 0.8, scores


def test_the_shipped_model_has_the_sizes_that_pretraining_gives():
    for part, sizes in (("unet", model.UNET), ("vae", model.VAE), ("text_encoder", model.TEXT)):
        config = json.loads((model.WEIGHTS / part / "config.json").read_text())
        differing = {name for name, value in json.loads(json.dumps(sizes)).items() if config[name] != value}
        assert differing <= {"scaling_factor"}, part


def test_pretraining_runs_from_nothing_and_resumes(tmp_path):
    small = pretrain.PretrainSettings(
        pictures=64,
        autoencoder_steps=2,
        autoencoder_batch=2,
        decoder_steps=1,
        decoder_pictures=16,
        text_steps=2,
        text_batch=8,
        denoiser_steps=2,
        denoiser_batch=2,
        names_pictures=16,
        names_steps=1,
    )
    pretrain.run(tmp_path, small)
    whole = torch.load(tmp_path / "denoiser.pt", weights_only=True)
    assert whole["step"] == 2
    pretrain.run(tmp_path, replace(small, denoiser_steps=4))
    assert torch.load(tmp_path / "denoiser.pt", weights_only=True)["step"] == 4
    pretrain.assemble(tmp_path, tmp_path / "weights")
    for folder in (tmp_path / "weights", model.WEIGHTS):  # as transformers 5.0 takes them; others it fills at random
        names = load_file(folder / "text_encoder" / "model.safetensors")
        assert all(name.startswith("text_model.") for name in names)
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    denoiser = DiffusersDenoiser.from_pretrained(tmp_path / "weights")
    assert denoiser.default_resolution == model.PICTURE_SIZE and denoiser.prediction_type == "v_prediction"
    (tmp_path / "decoder.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"decoder\.pt"):
        pretrain.assemble(tmp_path, tmp_path / "without")
    assert not (tmp_path / "without").exists()
