"""The anchor bank changes no bit of a training, and is shared by trainings that see the same."""

from __future__ import annotations

import logging

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.data.dataset import Dataset, Example
from anchor_core.training.bank import Bank
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models
from tests.comfyui import contract

CONCEPT = contract.CONCEPT


def trained(denoiser, shared, references=None, config=None, **options):
    """Losses and adapter of a short training."""
    given = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "w": 0.5, "memory": "off", **options}
    settings = TrainSettings(**given)
    if references is None:
        references = contract.draw(denoiser, tiny_models.LATENT, 3, seed=5)
    adapter = denoiser.attach(config or AdapterConfig(rank=2), seed=settings.seed)
    try:
        history = train(denoiser, adapter, references, CONCEPT, settings, bank=shared)
        return history.losses, adapter.state_dict()
    finally:
        denoiser.detach()


def assert_equal(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(part, other[1][name]) for name, part in one[1].items())


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 2, "accumulation": 2}, {"precision": "bf16"}])
def test_parts_and_precisions_change_no_bit(eps_denoiser, options):
    options = {"batch_size": 4, **options}
    bank = Bank(eps_denoiser)
    alone = trained(eps_denoiser, None, **options)
    assert_equal(trained(eps_denoiser, bank, **options), alone)
    assert_equal(trained(eps_denoiser, bank, **options), alone)
    assert bank.found == bank.computed > 0


def test_every_w_has_the_same_anchors(eps_denoiser):
    bank = Bank(eps_denoiser)
    for w in (0.0, 0.25, 1.0):
        assert_equal(trained(eps_denoiser, bank, w=w), trained(eps_denoiser, None, w=w))
    trained(eps_denoiser, bank, config=AdapterConfig(rank=4, kind="lora"))
    assert (bank.computed, bank.found) == (4, 8)


def test_trainings_on_one_dataset_draw_the_same(eps_denoiser):
    shared = Dataset.of_latents(contract.draw(eps_denoiser, tiny_models.LATENT, 3, seed=5), CONCEPT)
    bank = Bank(eps_denoiser)
    assert_equal(trained(eps_denoiser, bank, shared), trained(eps_denoiser, bank, shared))
    assert (bank.computed, bank.found) == (4, 4)


@pytest.mark.parametrize("objective", ["anchor", "blended_target"])
def test_fixed_draws_are_computed_once_and_serve_other_seeds(eps_denoiser, objective, tmp_path):
    options = {"draws": 4, "steps": 8, "objective": objective}
    alone = trained(eps_denoiser, None, **options)
    bank = Bank(eps_denoiser, tmp_path)
    assert_equal(trained(eps_denoiser, bank, **options), alone)
    assert bank.computed == 3  # one group of four draws a picture
    other = trained(eps_denoiser, bank, **options, seed=1)
    assert bank.computed == 3
    assert_equal(trained(eps_denoiser, Bank(eps_denoiser, tmp_path), **options, seed=1), other)
    assert_equal(trained(eps_denoiser, Bank(eps_denoiser, tmp_path, limit=1), **options), alone)


def test_fixed_draws_cover_the_schedule(eps_denoiser):
    seen = []
    eps_denoiser.add_noise, add_noise = (
        lambda *given: (seen.append(given), add_noise(*given))[1],
        eps_denoiser.add_noise,
    )
    trained(eps_denoiser, None, draws=4, steps=40, batch_size=3, objective="reconstruction")
    draws = {(float(row.sum()), float(noise.sum())): int(t) for given in seen for row, noise, t in zip(*given)}
    assert len(draws) == 12  # of three pictures, four each
    quarters = sorted(t // 250 for t in draws.values())
    assert quarters == [quarter for quarter in range(4) for _ in range(3)]


def test_masks_mirrors_and_captions_are_known_by_what_the_anchor_sees(eps_denoiser):
    latents = contract.draw(eps_denoiser, tiny_models.LATENT, 2, seed=5)
    mask = torch.ones(1, *latents.shape[2:])
    mask[..., :3] = 0
    subject, class_ = ("a photo of a sks dog", "a sks dog"), ("a photo of a dog", "a dog")
    references = [Example(row, subject, class_, mask, row.flip(-1)) for row in latents]

    def dataset():
        return Dataset(references, caption_dropout=0.3)

    for draws in (0, 3):
        options = {"draws": draws, "min_snr": 5.0, "steps": 30}
        bank = Bank(eps_denoiser)
        alone = trained(eps_denoiser, None, dataset(), **options)
        assert_equal(trained(eps_denoiser, bank, dataset(), **options), alone)
        assert_equal(trained(eps_denoiser, bank, dataset(), **options), alone)
        # pictures x mirrored x prompts, the empty one too
        assert bank.computed == (2 * 2 * 3 if draws else 30)


def test_another_model_or_class_prompt_is_another_anchor(eps_denoiser, tmp_path):
    trained(eps_denoiser, Bank(eps_denoiser, tmp_path))
    weight = eps_denoiser.network.conv_in.weight
    before = weight[0, 0, 0, 0].item()
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-3
    alone, bank = trained(eps_denoiser, None), Bank(eps_denoiser, tmp_path)
    assert_equal(trained(eps_denoiser, bank), alone)
    assert bank.found == 0
    with torch.no_grad():
        weight[0, 0, 0, 0] = before
    references = Dataset(
        [
            Example(row, (CONCEPT.subject_prompt,), ("a dog",))
            for row in contract.draw(eps_denoiser, tiny_models.LATENT, 3, seed=5)
        ]
    )
    bank = Bank(eps_denoiser, tmp_path)
    trained(eps_denoiser, bank, references)
    assert bank.found == 0


def test_damaged_files_are_computed_again_and_said(eps_denoiser, tmp_path, caplog):
    alone = trained(eps_denoiser, Bank(eps_denoiser, tmp_path))
    first, second, third, *_ = sorted(tmp_path.glob("anchors-*"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-1] + b"!")
    from safetensors.torch import save

    from anchor_core.data.digest import digest

    wrong = {"anchors": torch.zeros(1)}
    third.write_bytes(save(wrong, {"layout": "", "sha256": digest("", *wrong.values())}))
    bank = Bank(eps_denoiser, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert_equal(trained(eps_denoiser, bank), alone)
    assert (bank.computed, bank.found) == (3, 1)
    assert len([r for r in caplog.records if "anchors-" in r.getMessage()]) == 3
    whole = Bank(eps_denoiser, tmp_path)
    assert_equal(trained(eps_denoiser, whole), alone)
    assert whole.computed == 0


def test_at_its_limit_it_keeps_no_more_and_says_so_once(eps_denoiser, tmp_path, caplog):
    one = 2 * 4 * 8 * 8 * 4  # two rows in float32
    bank = Bank(eps_denoiser, tmp_path, limit=3 * one)
    alone = trained(eps_denoiser, None)
    with caplog.at_level(logging.WARNING):
        assert_equal(trained(eps_denoiser, bank), alone)
    assert len([r for r in caplog.records if "no more are kept" in r.getMessage()]) == 1
    assert len(list(tmp_path.glob("anchors-*"))) == 3
    assert_equal(trained(eps_denoiser, bank), alone)
    assert (bank.computed, bank.found) == (5, 3)


def test_a_full_disk_ends_no_training(eps_denoiser, tmp_path, caplog, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    alone = trained(eps_denoiser, None)
    bank = Bank(eps_denoiser, tmp_path)
    monkeypatch.setattr("anchor_core.data.cache.whole", full)
    with caplog.at_level(logging.WARNING):
        assert_equal(trained(eps_denoiser, bank), alone)
    assert [r.getMessage() for r in caplog.records] == [
        f"the cache folder {tmp_path} cannot be written (No space left on device); free space, give another folder, or "
        "train without one; the training goes on without writing anchors"
    ]


def test_draws_that_the_bank_cannot_hold_are_refused(eps_denoiser):
    with pytest.raises(ValueError, match="draws is 5000, whose 15000 anchors take 0.02 GB, but bank is 0.001 GB; take"):
        trained(eps_denoiser, None, draws=5000, bank=1e-3)


def test_draws_beyond_the_rows_are_said(eps_denoiser, caplog):
    with caplog.at_level(logging.WARNING):
        trained(eps_denoiser, None, draws=64)
    assert "draws 64 make 192 anchors, but the training sees 8 rows; draws 2 or 0 take less time" in caplog.text
