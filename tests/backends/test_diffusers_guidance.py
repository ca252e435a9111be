"""The guidance rules on diffusers' own pipelines of each architecture, against formulas written out by hand."""

from __future__ import annotations

import pytest
import torch

from anchor_core.guidance import make_rule
from tests.backends.guided_models import CLASSES, NULLS, SCALE, STEPS, SUBJECTS, Model, Predict, apart, close, led

CLASS_WORD_AT = (5, 2)  # of the class prompts' tokens, after that of the start


def cfg(p, prompts):
    return led(p(prompts), p(NULLS))


def mix(p, w_c, w_s):
    null = p(NULLS)
    return null + w_c * (p(SUBJECTS) - null) + w_s * (p(CLASSES) - null)


BY_HAND = {
    "cfg": ({"start": 0.25, "stop": 0.75}, lambda p, i: cfg(p, SUBJECTS) if i in (1, 2) else p(SUBJECTS)),
    "autoguidance": ({"weak": 0.4}, lambda p, i: led(p(SUBJECTS), p(SUBJECTS, 0.4))),
    "unconditional_priors": ({}, lambda p, i: led(p(SUBJECTS), p(NULLS, 0.0))),
    "personalization": ({"weak": 0.3}, lambda p, i: led(p(SUBJECTS), p(NULLS, 0.3))),
    "rare_to_frequent": ({"level": 5}, lambda p, i: cfg(p, CLASSES if i == 0 else SUBJECTS)),  # stop point 0.6
    "score_blend": ({"subject_share": 0.25}, lambda p, i: mix(p, 0.25 * SCALE, 0.75 * SCALE)),
    "switching": ({"switch": 0.5}, lambda p, i: cfg(p, CLASSES if i < 2 else SUBJECTS)),
    "mixed": ({"class_share": 1 / 3}, lambda p, i: mix(p, 2, 1)),
    "multi_stage": ({"switch": 0.5, "class_share": 1 / 3}, lambda p, i: cfg(p, CLASSES) if i < 2 else mix(p, 2, 1)),
}


def check_formula(model, name):
    options, formula = BY_HAND[name]
    rule, expected = make_rule(name, **options), model.by_hand(formula)
    close(model.guided(rule), expected)
    close(model.sample(rule), expected)
    assert apart(expected, model.plain)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rule_is_its_formula_on_pipelines_and_in_sample(sd1, name):
    check_formula(sd1, name)


@pytest.mark.parametrize("name", ["autoguidance", "personalization", "mixed"])
def test_rules_are_their_formulas_on_every_architecture(model, name):
    check_formula(model, name)


def class_word_map(predict: Predict, shape):
    """The class prompts' maps (B, 1, h, w), by diffusers' own attention scores, in a pass by itself."""
    from diffusers.models.attention_processor import AttnProcessor

    network, scores, names = predict.model.denoiser.network, [], []
    processors = network.attn_processors
    network.set_attn_processor(AttnProcessor())
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            names.append(module)
            module.get_attention_scores = lambda *given, own=module.get_attention_scores: (
                scores.append(own(*given)) or scores[-1]
            )
    predict(CLASSES)
    network.set_attn_processor(processors)
    for module in names:
        del module.get_attention_scores
    total = 0
    for each in scores:  # (B heads, S, T)
        positions = each.shape[1]
        height = round((positions * shape[0] / shape[1]) ** 0.5)
        of_word = torch.stack([rows.mean(0)[:, at] for rows, at in zip(each.chunk(2), CLASS_WORD_AT)])
        small = of_word.view(2, 1, height, positions // height)
        total = total + torch.nn.functional.interpolate(small, shape, mode="bilinear", align_corners=False)
    return total / len(scores)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_masked_sampling_reads_the_class_words_cross_attention(name, tmp_path):
    model, shares = Model(name, tmp_path), []
    model.noise = torch.cat([model.noise, model.noise.flip(0, 2)], dim=-1)  # wide: (2, 4, 8, 16)

    def formula(p, i):
        if i == 0:
            return cfg(p, CLASSES)
        found = class_word_map(p, (8, 16))
        threshold = torch.stack([row.flatten().sort().values[round(0.75 * 127)] for row in found])
        inside = found > threshold.view(-1, 1, 1, 1)
        shares.append(inside.float().mean((1, 2, 3)))
        return torch.where(inside, mix(p, 2, 1), cfg(p, CLASSES))

    rule = make_rule("masked", switch=0.25, class_share=1 / 3, quantile=95 / 127)
    expected = model.by_hand(formula)
    assert all(torch.equal(share, torch.full((2,), 0.25)) for share in shares) and len(shares) == STEPS - 1
    close(model.guided(rule), expected)
    close(model.sample(rule), expected)
    assert not any(module._forward_hooks for module in model.denoiser.network.modules())
    with pytest.raises(ValueError, match="^the class prompt is the subject's"):
        model.guided(rule, class_prompt=list(SUBJECTS))


def test_limits_are_the_plain_pipeline(sd1):
    for name, options in (
        ("cfg", {}),
        ("personalization", {"weak": 1.0}),
        ("switching", {"switch": 0.0}),
        ("mixed", {"class_share": 0.0}),
        ("rare_to_frequent", {"level": 0}),
    ):
        close(sd1.guided(make_rule(name, **options)), sd1.plain, 1e-5)
    with sd1.adapter.scaled(0.6):
        plain = sd1.run()
        close(sd1.guided(make_rule("personalization", weak=1.0)), plain, 1e-5)
        assert apart(plain, sd1.guided(make_rule("personalization", weak=0.5)))
    close(sd1.guided(make_rule("switching", switch=1.0)), sd1.run(CLASSES), 1e-5)
    with sd1.adapter.disabled():
        close(sd1.guided(make_rule("personalization", weak=0.3)), sd1.run(), 1e-5)


def test_at_a_scale_of_1_every_rule_is_conditional(sd1):
    conditional = sd1.run(scale=1.0)
    for name in ("cfg", "autoguidance", "unconditional_priors", "personalization"):
        close(sd1.guided(make_rule(name), scale=1.0), conditional, 1e-5)
        close(sd1.sample(make_rule(name), scale=1.0), conditional)
    close(sd1.guided(make_rule("autoguidance", weak=1.0)), conditional, 1e-5)
    close(sd1.guided(make_rule("personalization", start=1.0)), conditional, 1e-5)
    blend = sd1.by_hand(lambda p, i: (p(SUBJECTS) + p(CLASSES)) / 2)
    close(sd1.guided(make_rule("mixed"), scale=1.0), blend)


def test_personalization_at_0_is_unconditional_priors(sd1):
    assert torch.equal(
        sd1.guided(make_rule("personalization", weak=0.0)), sd1.guided(make_rule("unconditional_priors"))
    )


def test_an_early_checkpoint_is_the_weak_model(sd1):
    own = sd1.adapter.state_dict()
    early = {name: tensor if name.endswith("alpha") else 0.7 * tensor.flip(0) for name, tensor in own.items()}
    sd1.adapter.hold_early(early)

    def formula(p, i):
        strong = p(SUBJECTS)
        sd1.adapter.load_state_dict(early)
        weak = p(SUBJECTS)
        sd1.adapter.load_state_dict(own)
        return led(strong, weak)

    expected = sd1.by_hand(formula)
    rule = make_rule("autoguidance", early=True)
    close(sd1.guided(rule), expected)
    close(sd1.sample(rule), expected)
    assert apart(expected, sd1.plain)
    after = sd1.adapter.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in own.items())
