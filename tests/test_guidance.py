"""The guidance rules as formulas: identities and limits, in float64 on predictions drawn by branch."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from anchor_core.branches import CLASS, NULL, SUBJECT, Branch, Table, guide
from anchor_core.guidance import RULE_OPTIONS, RULES, make_rule

SCALES = (0.0, 0.5, 1.0, 3.0, 7.5)
STEPS = 20


class Predictions(dict):
    """A prediction (2, 3, 4, 4) for each branch, drawn when it is first asked for; `same` prompts share theirs."""

    def __init__(self, same: tuple[str, ...] = ()):
        super().__init__()
        self.same = same

    def __missing__(self, branch: Branch) -> torch.Tensor:
        if branch.prompt in self.same and branch.prompt != self.same[0]:
            return self[Branch(self.same[0], branch.strength, branch.early)]
        seed = len(self) + 1
        self[branch] = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return self[branch]


def combined(rule, step: int, scale: float, predictions, steps: int = STEPS, mask=None) -> torch.Tensor:
    """What a rule makes of the predictions; only those of the branches that count may be asked for."""
    table, scale = rule.table(step, steps), rule.scale_at(step, steps, scale)
    needed = {branch: predictions[branch] for branch in table.branches(scale)}
    return guide(table, needed, scale, mask)


def cfg(predictions, scale: float, prompt: Branch = SUBJECT) -> torch.Tensor:
    return predictions[NULL] + scale * (predictions[prompt] - predictions[NULL])


def check_same(rule, other, **options) -> None:
    """Two rules, or a rule and a formula of (predictions, scale), make the same at every step and scale."""
    for scale in SCALES:
        predictions = Predictions(**options)
        for step in range(STEPS):
            theirs = other(predictions, scale) if callable(other) else combined(other, step, scale, predictions)
            torch.testing.assert_close(combined(rule, step, scale, predictions), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", SCALES)
def test_coefficients_sum_to_1_so_that_every_prediction_space_is_the_same(name, scale):
    rule, predictions = make_rule(name), Predictions()
    latents = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma, mask = 0.6, 0.8, (latents[:, :1] > 0).double()
    for step in range(STEPS):
        table = rule.table(step, STEPS)
        assert sum(table.coefficients(scale).values()) == pytest.approx(1)
        guided = combined(rule, step, scale, predictions, mask=mask)
        # v = (eps - sigma z_t) / alpha and x0 = (z_t - sigma eps) / alpha
        for space in (lambda eps: (eps - sigma * latents) / alpha, lambda eps: (latents - sigma * eps) / alpha):
            there = combined(rule, step, scale, {b: space(eps) for b, eps in predictions.items()}, mask=mask)
            torch.testing.assert_close(there, space(guided), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_a_scale_of_1_is_the_conditional_prediction_and_leaves_the_other_branch_out(name):
    rule, predictions = make_rule(name), Predictions()
    for step in range(STEPS):
        table = rule.table(step, STEPS)
        assert (table.away in table.branches(1.0)) == (table.away in table.towards)
        assert len(table.branches(7.5)) <= 3
        mask = torch.ones(2, 1, 4, 4, dtype=torch.float64)
        conditional = table.conditional({branch: predictions[branch] for branch in table.branches(1.0)}, mask)
        assert torch.equal(combined(rule, step, 1.0, predictions, mask=mask), conditional)


def test_personalization_guidance_is_a_path_from_unconditional_priors_to_cfg():
    check_same(make_rule("personalization", weak=1.0), make_rule("cfg"))
    check_same(make_rule("personalization", weak=0.0), make_rule("unconditional_priors"))
    for weak in (0.0, 0.3, 1.0):
        rule, predictions = make_rule("personalization", weak=weak), Predictions()
        assert torch.equal(combined(rule, 3, 1.0, predictions), predictions[SUBJECT])
        away = predictions[Branch("null", weak)]
        expected = away + 4 * (predictions[SUBJECT] - away)
        torch.testing.assert_close(combined(rule, 3, 4.0, predictions), expected, rtol=0, atol=1e-12)


def test_autoguidance_with_the_model_itself_is_no_guidance():
    check_same(make_rule("autoguidance", weak=1.0), lambda predictions, scale: predictions[SUBJECT])
    assert make_rule("autoguidance", weak=1.0).table(0, 10).branches(2.0) == [SUBJECT]
    assert make_rule("autoguidance", weak=0.5, early=True).branches == [SUBJECT, Branch("subject", early=True)]


def test_outside_of_its_interval_a_rule_is_conditional():
    # EDM2-XXL's preset: the steps 17 to 22, both included, of 32
    rule, predictions = make_rule("personalization", start=17 / 32, stop=23 / 32), Predictions()
    for step in range(32):
        guided = combined(rule, step, 3.0, predictions, steps=32)
        assert torch.equal(guided, predictions[SUBJECT]) == (not 17 <= step <= 22)
        assert len(rule.table(step, 32).branches(rule.scale_at(step, 32, 3.0))) == (2 if 17 <= step <= 22 else 1)
    assert all(make_rule("cfg", start=0.3, stop=0.3).scale_at(step, 10, 5.0) == 1 for step in range(10))
    assert all(make_rule("cfg").scale_at(step, 7, 5.0) == 5 for step in range(7))


def test_limits_of_beyond_fine_tuning():
    check_same(make_rule("switching", switch=0.0), make_rule("cfg"))
    check_same(make_rule("switching", switch=1.0), lambda predictions, scale: cfg(predictions, scale, CLASS))
    check_same(make_rule("mixed", class_share=0.0), make_rule("cfg"))
    for name in ("switching", "mixed", "multi_stage"):
        check_same(make_rule(name), make_rule("cfg"), same=("subject", "class"))
    check_same(make_rule("multi_stage", switch=0.3, class_share=0.0), make_rule("switching", switch=0.3))
    check_same(make_rule("multi_stage", switch=0.0, class_share=0.4), make_rule("mixed", class_share=0.4))


def test_masked_sampling_of_the_class_alone_needs_no_mask():
    rule = make_rule("masked", early_share=1.0, class_share=1.0)
    check_same(rule, lambda predictions, scale: cfg(predictions, scale, CLASS))


def test_switching_changes_over_at_the_published_steps():
    for switch, steps, first in ((0.14, 50, 7), (0.2, 50, 10), (0.4, 20, 8)):
        rule = make_rule("switching", switch=switch)
        led = [next(iter(rule.table(step, steps).towards)) for step in range(steps)]
        assert led == [CLASS] * first + [SUBJECT] * (steps - first)


def test_mixed_is_the_published_sum_and_the_score_blend():
    predictions = Predictions()
    null, subject, class_ = (predictions[branch] for branch in (NULL, SUBJECT, CLASS))
    expected = null + 2.5 * (subject - null) + 2.0 * (class_ - null)
    rule = make_rule("mixed", class_share=2.0 / 4.5)
    torch.testing.assert_close(combined(rule, 0, 4.5, predictions), expected, rtol=0, atol=1e-12)
    check_same(make_rule("score_blend", subject_share=0.7), make_rule("mixed", class_share=0.3))
    blend = 2 / 3 * subject + 1 / 3 * class_  # lambda = 1 / (1 + w), w = 0.5
    torch.testing.assert_close(combined(make_rule("score_blend"), 0, 1.0, predictions), blend, rtol=0, atol=1e-12)


def test_masked_sampling_is_mixed_inside_and_the_class_outside():
    rule, predictions = make_rule("masked", switch=0.5, early_share=0.75, class_share=0.5, quantile=0.7), Predictions()
    early = predictions[NULL] + 7 * (0.25 * predictions[SUBJECT] + 0.75 * predictions[CLASS] - predictions[NULL])
    torch.testing.assert_close(combined(rule, 9, 7.0, predictions), early, rtol=0, atol=1e-12)
    assert rule.table(9, STEPS).outside is None
    mixed, class_ = combined(make_rule("mixed"), 0, 7.0, predictions), cfg(predictions, 7.0, CLASS)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(combined(rule, 10, 7.0, predictions, mask=mask), class_, rtol=0, atol=1e-12)
    torch.testing.assert_close(combined(rule, 10, 7.0, predictions, mask=mask + 1), mixed, rtol=0, atol=1e-12)
    mask[0, :, 1:3] = 1
    guided = combined(rule, 10, 7.0, predictions, mask=mask)
    torch.testing.assert_close(guided, torch.where(mask.bool(), mixed, class_), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="^mask is None"):
        combined(rule, 10, 7.0, predictions)


@pytest.mark.parametrize(("stops", "published"), [("sd3", (0, 5, 10, 20, 30, 40)), ("sdxl", (0, 3, 5, 10, 20, 30))])
def test_rare_to_frequent_alternates_until_its_stop_point(stops, published):
    for level, stop in enumerate(published):
        rule = make_rule("rare_to_frequent", level=level, stops=stops)
        led = [next(iter(rule.table(step, 50).towards)) for step in range(50)]
        assert all(branch == SUBJECT for branch in led[1::2]), "an odd step is the subject's"
        assert led[:stop:2] == [CLASS] * len(led[:stop:2]) and led[stop:] == [SUBJECT] * (50 - stop)
    check_same(make_rule("rare_to_frequent", level=0), make_rule("cfg"))
    thirds = make_rule("rare_to_frequent", level=5, period=3)
    assert [i for i in range(20) if CLASS in thirds.table(i, 20).towards] == [0, 3, 6, 9]


def test_a_table_asks_for_no_branch_of_share_0():
    table = Table({SUBJECT: 1.0, CLASS: 0.0})
    assert table.branches(5.0) == [SUBJECT, NULL] and table.branches(1.0) == [SUBJECT]
    assert table.branches(0.0) == [NULL]
    assert make_rule("mixed").table(0, 10).branches(5.0) == [SUBJECT, CLASS, NULL]


@pytest.mark.parametrize("name", RULES)
def test_a_rules_branches_are_those_of_its_steps(name):
    rule = make_rule(name)
    asked = {branch for step in range(50) for branch in rule.table(step, 50).branches(7.5)}
    assert asked == set(rule.branches)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("personalisation", {}, "^rule is 'personalisation', but it takes one of cfg, autoguidance"),
        ("cfg", {"weak": 0.5}, "^rule 'cfg' has no option 'weak', but it takes start, stop$"),
        ("personalization", {"weak": 1.5}, "^weak is 1.5, but it takes a number from 0 to 1"),
        ("personalization", {"weak": float("nan")}, "^weak is nan"),
        ("personalization", {"weak": True}, "^weak is True"),
        ("cfg", {"start": 0.5, "stop": 0.25}, "^start is 0.5, but it takes at most stop"),
        ("cfg", {"start": -0.1}, "^start is -0.1"),
        ("rare_to_frequent", {"level": 6}, "^level is 6, but it takes one of 0, 1, 2, 3, 4, 5"),
        ("rare_to_frequent", {"stops": "flux"}, "^stops is 'flux', but it takes one of sd3, sdxl"),
        ("rare_to_frequent", {"period": 0}, "^period is 0"),
        ("masked", {"quantile": 1.0}, "^quantile is 1.0"),
        ("autoguidance", {"early": "yes"}, "^early is 'yes'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_rule(name, **options)


def test_a_scale_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="^scale is inf"):
        make_rule("cfg").scale_at(0, 10, float("inf"))


def test_every_option_of_every_rule_is_listed():
    assert {(name, rule) for name, owners in RULE_OPTIONS.items() for rule in owners} == {
        (each.name, rule.name) for rule in RULES.values() for each in fields(rule)
    }
