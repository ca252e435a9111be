"""SuDe and ClassDiffusion: their formulas, against the published forms, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from anchor_core import cli
from anchor_core.adapters.config import AdapterConfig
from anchor_core.denoiser import Step, Texts
from anchor_core.objectives import class_diffusion, make_objective, mse, reconstruction, sude
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

TIMES = torch.tensor([0, 1, 100, 500, 900])


def predicted(*names: str, seed: int = 0) -> list[torch.Tensor]:
    """A native prediction (5, 4, 8, 8) in float64 for each name."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in names]


def step_of(denoiser, subject, class_, null, weights=None, masks=None) -> Step:
    """A step at `TIMES` whose predictions are these."""
    latents = torch.zeros(5, 4, 8, 8, dtype=torch.float64)
    step = Step(denoiser, latents, latents, TIMES, [None] * 5, [None] * 5, weights=weights, masks=masks)
    step.subject, step.current_anchor, step.unconditional = subject, class_, null
    return step


def schedule(denoiser) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """abar_t, abar_{t-1} and beta_t of `TIMES`, (5, 1, 1, 1), in float64."""
    bars = denoiser.scheduler.alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars])[TIMES]
    return tuple(part.view(-1, 1, 1, 1) for part in (bars[TIMES], before, 1 - bars[TIMES] / before))


def to_epsilon(denoiser, native: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    now, _, _ = schedule(denoiser)
    return native if denoiser.prediction_type == "epsilon" else (1 - now).sqrt() * noisy + now.sqrt() * native


def published_form(denoiser, subject, class_, null, masks=None) -> torch.Tensor:
    """l / coef1 g of each row, (5,), by the posterior means as the authors compute them."""
    now, before, beta = schedule(denoiser)
    (noisy,) = predicted("z_t", seed=5)
    coef1 = beta * before.sqrt() / (1 - now)
    coef2 = (1 - before) * (1 - beta).sqrt() / (1 - now)
    variance = (beta * (1 - before) / (1 - now)).flatten()

    def mean(native):
        z_0 = (noisy - (1 - now).sqrt() * to_epsilon(denoiser, native, noisy)) / now.sqrt()
        return coef1 * z_0 + coef2 * noisy

    def distance(one, other):
        error = (mean(one) - mean(other)).square()
        return error.mean((1, 2, 3)) if masks is None else (error * masks).sum((1, 2, 3)) / (4 * masks.sum((1, 2, 3)))

    likelihood = (distance(subject, class_) - distance(subject, null)) / (2 * variance + 1e-6)
    reference = -distance(class_, null) / (2 * variance + 1e-6)
    return likelihood * (likelihood > reference) / coef1.flatten()


@pytest.mark.parametrize("masked", [False, True])
def test_sude_is_the_published_form(denoiser, masked):
    subject, class_, null = predicted("subject", "class", "null")
    subject[3] = class_[3] + 0.1 * (class_[3] - null[3])  # past its class: truncated
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    masks = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(9)).double() if masked else None
    step = step_of(denoiser, subject, class_, null, weights, masks)
    rows = published_form(denoiser, subject, class_, null, masks)
    assert rows[3] == 0 and (rows != 0).sum() == 4
    expected = 0.8 * (weights * rows).mean()
    terms = sude(step, sude_weight=0.8, prior_weight=0)
    torch.testing.assert_close(terms["sude"], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(terms["reconstruction"], mse(subject, step.target, weights, masks))


def test_sude_in_epsilon_is_the_compact_form(eps_denoiser):
    """l / coef1 = k_t (mean (eps_s - eps_c)^2 - mean (eps_s - eps_0)^2) but for the 1e-6."""
    subject, class_, null = predicted("subject", "class", "null")
    now, before, _ = (part.flatten() for part in schedule(eps_denoiser))
    k = before.sqrt() * (1 - now) / (2 * now * (1 - before))
    errors = (subject - class_).square().mean((1, 2, 3)) - (subject - null).square().mean((1, 2, 3))
    full = published_form(eps_denoiser, subject, class_, null)
    torch.testing.assert_close(full[2:], (k * errors)[2:], rtol=2e-3, atol=0)
    for t, size in ((2, 0.54), (3, 0.96)):
        assert k[t].item() == pytest.approx(size, abs=0.03)


def test_the_push_of_sude_does_not_depend_on_the_subject(denoiser):
    """Where g = 1 its gradient is constant, along eps_0 - eps_c; where g = 0 it is 0."""
    _, class_, null = predicted("subject", "class", "null")

    def gradient(subject):
        subject = subject.clone().requires_grad_()
        return torch.autograd.grad(sude(step_of(denoiser, subject, class_, null), prior_weight=0)["sude"], subject)[0]

    one, other = (gradient(null + 0.1 * noise) for noise in predicted("one", "other", seed=3))
    torch.testing.assert_close(one, other)
    direction = (null - class_).flatten(1)
    torch.testing.assert_close(torch.cosine_similarity(one.flatten(1), direction), torch.ones(5, dtype=torch.float64))
    assert not gradient(class_ + (class_ - null)).any()
    assert not gradient(class_).any()


def test_sude_is_finite_at_zero_terminal_snr(tmp_path):
    from tests.backends import tiny_models

    denoiser = tiny_models.denoiser_of(tiny_models.build("sd2_v", tmp_path))
    step = step_of(denoiser, *predicted("subject", "class", "null"))
    step.timesteps = torch.tensor([999] * 5)
    assert denoiser.snr(step.timesteps).max() == 0
    term = sude(step, prior_weight=0)["sude"]
    assert torch.isfinite(term) and term != 0


def test_everything_in_sude_is_of_the_current_network(eps_denoiser, concept, latents, stir):
    """Class and empty prompt by the adapted network and text encoder, without a graph."""
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    stir(adapter)
    asked = []

    def encode(prompts):
        asked.append(list(prompts))
        return eps_denoiser.encode_prompts(prompts, adapted=True)

    conditions = [eps_denoiser.encode_prompt(concept.class_prompt)] * 3
    texts = Texts([concept.class_prompt] * 3, encode, concept.subject_prompt)
    step = Step(eps_denoiser, latents, latents, torch.tensor([20, 400, 900]), conditions, conditions, texts=texts)
    pairs = ((step.unconditional, ""), (step.current_anchor, concept.class_prompt))
    assert asked == [[prompt] * 3 for _, prompt in pairs]
    for prediction, prompt in pairs:
        assert not prediction.requires_grad
        with torch.no_grad():
            current = [eps_denoiser.encode_prompt(prompt, adapted=True)] * 3
            expected = eps_denoiser.predict(step.noisy, step.timesteps, current)
            pretrained = eps_denoiser.predict(step.noisy, step.timesteps, [eps_denoiser.encode_prompt(prompt)] * 3)
        assert torch.equal(prediction, expected) and not torch.allclose(prediction, pretrained, atol=1e-4)


def test_the_class_diffusion_term_is_a_distance_of_texts(eps_denoiser, concept, make_step, stir):
    """1 - cos of the pooled outputs, whose gradient reaches the text encoder's adapter alone."""
    from transformers import CLIPTextModel

    adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    step = make_step(eps_denoiser)
    step.texts.class_pooled = eps_denoiser.encode_pooled([concept.class_prompt])
    encoder: CLIPTextModel = eps_denoiser.text_encoder
    ids = [eps_denoiser.tokenizer(text, padding="max_length", return_tensors="pt").input_ids for text in
           (concept.subject_prompt, concept.class_prompt)]  # fmt: skip
    subject, class_ = (encoder(each).pooler_output for each in ids)
    expected = 1 - torch.cosine_similarity(subject, class_).item()
    assert step.text_distance.item() == pytest.approx(expected, abs=1e-5) and expected > 1e-3

    stir(adapter)
    terms = class_diffusion(make_texts(make_step(eps_denoiser), step.texts.class_pooled), semantic_weight=0.5)
    gradients = torch.autograd.grad(terms["semantic"], adapter.parameters(), materialize_grads=True)
    names = [name for name in adapter.module_names for _ in range(2)]
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient.any()}
    assert reached and all(name.startswith("te:") for name in reached)
    plain = reconstruction(make_step(eps_denoiser))["reconstruction"]
    assert terms["reconstruction"].item() == pytest.approx(plain.item())


def make_texts(step: Step, class_pooled: torch.Tensor) -> Step:
    step.texts.class_pooled = class_pooled
    return step


def test_class_diffusion_alone_brings_the_texts_together(eps_denoiser, latents, concept):
    """Thirty steps at a large weight bring the subject's text nearer to the pretrained class's."""
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, text_encoder=True))
    settings = TrainSettings(objective="class_diffusion", semantic_weight=100.0, steps=30, batch_size=1)
    history = train(eps_denoiser, adapter, latents, concept, settings)
    assert history.terms["semantic"][-1] < 0.5 * history.terms["semantic"][0]


def test_what_has_no_meaning_is_refused_before_the_first_step(eps_denoiser, latents, concept, tmp_path, capsys):
    with pytest.raises(ValueError, match="^objective is 'sude'.*flow model has none; take anchor"):
        make_objective("sude").check("flow")
    make_objective("sude", sude_weight=0).check("flow")
    make_objective("class_diffusion", semantic_weight=0).check("flow")
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="^objective is 'class_diffusion'.*set text_encoder"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(objective="class_diffusion", steps=2))
    assert all(torch.equal(tensor, adapter.state_dict()[name]) for name, tensor in before.items())
    eps_denoiser.detach()
    with pytest.raises(ValueError, match="^text_encoder is True, but layers 'attn2' selects none of its layers"):
        eps_denoiser.attach(AdapterConfig(layers="attn2", text_encoder=True))
    for name in ("sude_weight", "semantic_weight"):
        with pytest.raises(ValueError, match=f"^{name} is -1"):
            TrainSettings(**{name: -1.0})


def test_the_command_line_takes_them_and_lambda(tmp_path, capsys):
    import json

    references, out = tmp_path / "pip", tmp_path / "out"
    assert cli.main(["sandbox", "subject", "pip", "--out", str(references)]) == 0
    train_ = ["train", "--model", "sandbox", "--references", str(references), "--subject", "a photo of a sks star"]
    train_ += ["--class", "a photo of a star", "--steps", "2", "--batch_size", "2", "--rank", "2"]
    options = ["--objective", "class_diffusion", "--text_encoder", "--lambda", "0.8"]
    assert cli.main([*train_, "--out", str(out), *options]) == 0
    assert json.loads((out / "report.json").read_text())["settings"]["w"] == pytest.approx(0.25)
    capsys.readouterr()
    for options, told in (
        (["--objective", "class_diffusion"], "--objective: objective is 'class_diffusion'"),
        (["--lambda", "0"], "--lambda: lambda is 0.0"),
        (["--lambda", "nan"], "--lambda: lambda is nan"),
    ):
        assert cli.main([*train_, "--out", str(tmp_path / "none"), *options]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        cli.main([*train_, "--out", str(tmp_path / "none"), "--lambda", "0.5", "--w", "1"])
    assert "not allowed with" in capsys.readouterr().err
