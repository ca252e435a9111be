"""What a benchmark's config holds, and what is refused of one before anything is computed."""

from __future__ import annotations

import json

import pytest

from anchor_core.bench import sandbox_settings
from anchor_core.bench.config import parse, read_config, shipped
from anchor_core.bench.rows import ORACLE, PRETRAINED
from anchor_core.objectives import matched_learning_rate
from anchor_core.training.methods import method_options

ROWS = {"trainings": {"plain": {"objective": "reconstruction"}, "anchored": {"objective": "anchor", "w": 0.5}}}


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_are_whole(name):
    config = read_config(name, {"model": "some/model", "references": ".", "prompts": "."} if "dream" in name else {})
    assert config.name == name and len(config.rows) > 3
    assert name == "tune" or not set(config.subjects) & set(sandbox_settings.TUNING_SUBJECTS)


def test_the_claims_have_their_subjects_and_seeds():
    config = read_config("claims")
    assert len(config.subjects) >= 8 and len(config.seeds) >= 3
    told = {claim.source for claim in config.claims}
    wanted = ("Table 1", "Fig. 2", "Fig. 5", "control", "Fig. 6", "Fig. 8a", "Fig. 8b", "Fig. 8c", "PG", "UPM", "BFT",
              "TEA", "ClassDiffusion", "SuDe")  # fmt: skip
    assert all(any(each in source for source in told) for each in wanted)


def test_a_list_is_as_many_rows_and_a_method_keeps_its_form_alone():
    raw = {
        "trainings": {
            "w = {w}": {"objective": "anchor", "w": [0.25, 1]},
            "rate": {"objective": "reconstruction", "matched": 0.5},
            "custom": {"method": "custom_diffusion", "learning_rate": 2e-3},
        },
        "samplings": {"{rule}, {guidance}": {"of": ["rate"], "rule": ["mixed", "cfg"], "guidance": [2.0, 4.5]}},
    }
    config = parse(raw)
    assert list(config.trainings) == ["w = 0.25", "w = 1", "rate", "custom"]
    assert config.trainings["w = 0.25"].settings.w == 0.25
    base = sandbox_settings.SETTINGS
    rate = config.trainings["rate"].settings.learning_rate
    assert rate == pytest.approx(matched_learning_rate(base.learning_rate, 0.5))
    assert list(config.samplings) == [f"rate + {rule}, {scale}" for rule in ("mixed", "cfg") for scale in ("2", "4.5")]
    assert config.samplings["rate + mixed, 4.5"].own == {"guidance": 4.5}
    custom, published = config.trainings["custom"], method_options("custom_diffusion")
    assert custom.settings.steps == base.steps != published["steps"]
    assert custom.adapter.layers == published["layers"] and custom.adapter.vectors == 1
    assert config.trainings["w = 1"].adapter == sandbox_settings.ADAPTER != custom.adapter
    assert custom.settings.token_learning_rate == 0 != base.token_learning_rate
    matched = config.trainings["rate"].settings.token_learning_rate
    assert matched == pytest.approx(matched_learning_rate(base.token_learning_rate, 0.5))
    assert config.rows[:2] == [PRETRAINED, ORACLE] and config.base == "w = 0.25"


def test_another_model_takes_the_whole_method_over_its_preset(tmp_path):
    source = {"source": {"references": ".", "prompts": "prompts.txt"}}
    config = parse({"model": "some/model", "preset": "sdxl", "trainings": {"oft": {"method": "oft"}, "p": {}}} | source)
    assert config.rows == [PRETRAINED, "oft", "p"]  # its subjects are pictures: no code draws what a prompt asks for
    assert config.trainings["oft"].settings.steps == 10005 and config.trainings["oft"].settings.accumulation == 4
    assert config.trainings["p"].settings.learning_rate == 1e-4 and config.sampling.count == 4


def test_json_is_read_and_paths_begin_at_the_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    raw = {"model": "m", "source": {"references": "pictures", "prompts": "p.txt"}, **ROWS}
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    config = read_config(tmp_path / "bench.json", {"clip": "other/clip", "dino": None})
    assert config.source.references == str((tmp_path / "pictures").resolve())
    assert (config.source.prompts, config.source.clip, config.source.dino) == ("p.txt", "other/clip", "")


CLAIM = {"name": "more text", "of": "anchored", "against": "plain", "score": "text_alignment", "expect": "higher"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subject": []}, "the config has a key 'subject', but it takes name, model"),
        ({"trainings": {}}, "trainings is empty"),
        ({"trainings": {"a": {"lr": 1}}}, "trainings.a has a key 'lr', but it takes method"),
        ({"trainings": {"a": {"w": -1}}}, "trainings.a: w is -1, but it takes"),
        ({"trainings": {"a": {"w": [1, 2]}}}, r"trainings.a.w is \[1, 2\], a list, but then the row's name takes {w}"),
        ({"trainings": {"a": {"method": "best"}}}, "trainings.a: method is 'best', but it takes one of"),
        ({"samplings": {"s": {"rule": "cfg"}}}, "samplings.s.of is empty"),
        ({"samplings": {"s": {"of": ["none"]}}}, "samplings.s.of is 'none', but it takes one of plain, anchored"),
        ({"samplings": {"s": {"of": ["plain"], "rule": "best"}}}, r"samplings.plain \+ s: rule is 'best'"),
        ({"samplings": {"s": {"of": ["plain"], "weak": 0.5}}}, "weak is an option of a guidance rule; give rule too"),
        ({"samplings": {"s": {"of": ["plain"], "alpha": 0.5}}}, "alpha is an option of an adjustment"),
        (
            {"training": {"vectors": 0}, "samplings": {"s": {"of": ["plain"], "adjust": "vectors"}}},
            "plain trains no vectors; take index",
        ),
        ({"base": "other"}, "base is 'other', but it takes one of the rows"),
        ({"sampling": {"steps": 0}}, "sampling.steps is 0, but it takes a whole number"),
        ({"source": {"references": "x"}}, "source is given, but the embedded model draws its own subjects"),
        ({"model": "m"}, "source.references is empty"),
        ({"preset": "sd1"}, "preset is 'sd1', but the embedded model has its own settings"),
        ({"seeds": 1}, "seeds is 1, but it takes a list"),
        ({"claims": [{**CLAIM, "expect": "best"}]}, r"claims\[0\].expect is 'best'"),
        ({"claims": [{**CLAIM, "of": "none"}]}, r"claims\[0\].of is 'none'"),
        ({"claims": [{**CLAIM, "expect": "same"}]}, "margin is 0, but it takes a number above 0 with expect same"),
        ({"claims": [{**CLAIM, "of": ["plain", "anchored"]}]}, "but then equal takes a score"),
        ({"figures": [{"name": "f", "lines": {"a": "none"}}]}, r"figures\[0\].lines.a is 'none'"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_the_name_of_its_key(changed, message):
    with pytest.raises(ValueError, match=message):
        parse(ROWS | changed)


def test_a_file_that_is_no_config_is_named(tmp_path):
    (tmp_path / "bench.toml").write_text("name = ")
    with pytest.raises(ValueError, match="which is no TOML or JSON"):
        read_config(tmp_path / "bench.toml")
    with pytest.raises(ValueError, match="one of ablation, claims"):
        read_config("nothing")
