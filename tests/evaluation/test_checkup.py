"""The check-up of an adapter: its numbers against predictions made one by one, its page, and hostile files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import to_file_keys
from anchor_core.adapters.stated import Prompts, prompts_of
from anchor_core.evaluation import checkup_page
from anchor_core.evaluation.checkup import WEAKS, about_file, check_up
from anchor_core.evaluation.settings import BUDGET, CheckupSettings
from anchor_core.evaluation.verdict import CHANGES, HARM, HARMS, KEEPS

PROMPTS = prompts_of({}, "a photo of a sks dog", "a photo of a dog")
ALONE = prompts_of({}, "", "a photo of a dog")
SMALL = CheckupSettings(timesteps=2, noises=2, seed=4)
SHAPE = (4, 8, 8)


def made(denoiser, stir, size: float = 0.3, **options) -> dict[str, torch.Tensor]:
    """The file of an adapter with weights at random; the denoiser has none afterwards."""
    adapter = denoiser.attach(AdapterConfig(**{"rank": 2, **options}))
    stir(adapter, size=size)
    tensors = to_file_keys(adapter, denoiser.file_keys())
    denoiser.detach()
    return tensors


def report_of(denoiser, tensors, latents, prompts: Prompts = PROMPTS, metadata=None, settings=SMALL, **options):
    return check_up(
        denoiser, lambda: attach_tensors(denoiser, tensors, metadata), metadata or {}, prompts, latents=latents,
        shape=SHAPE, settings=settings, **options,
    )  # fmt: skip


def epsilon(denoiser, z0, noise, t, condition):
    """By the definition of epsilon."""
    time = torch.tensor([t])
    noisy = denoiser.add_noise(z0[None], noise[None], time)
    with torch.no_grad():
        prediction = denoiser.predict(noisy, time, [condition])
    if denoiser.prediction_type == "epsilon":
        return prediction
    cumulative = denoiser.scheduler.alphas_cumprod[t]
    return (1 - cumulative).sqrt() * noisy + cumulative.sqrt() * prediction


def test_the_numbers_are_distances_of_predictions(denoiser, latents, stir):
    tensors = made(denoiser, stir)
    report = report_of(denoiser, tensors, latents)
    assert denoiser.adapter is None
    noises = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(4))
    points = [(z0, noise, t) for t in (250, 750) for z0 in latents for noise in noises]
    texts = {"class": PROMPTS.class_prompt, "empty": "", "subject": PROMPTS.subject}
    conditions = {name: denoiser.encode_prompt(text) for name, text in texts.items()}

    def predictions(name):
        return torch.cat([epsilon(denoiser, *point, conditions[name]) for point in points])

    def mean(difference):
        return difference.flatten(1).norm(dim=1).mean().item()

    before = {name: predictions(name) for name in texts}
    adapter = attach_tensors(denoiser, tensors)
    after = {name: predictions(name) for name in texts}
    moved = {name: after[name] - before[name] for name in texts}
    effect = mean(before["class"] - before["empty"])
    assert report["prompt_effect"] == pytest.approx(effect, rel=1e-3)
    for name, told in {**report["without_trigger"], "subject": report["with_trigger"]}.items():
        change = mean(moved[name])
        assert told["change"] == pytest.approx(change, rel=1e-3)
        assert told["of_prediction"] == pytest.approx(change / mean(before[name]), rel=1e-3)
        assert told["of_prompt"] == pytest.approx(change / effect, rel=1e-3)
        assert told["of_trigger"] == pytest.approx(change / mean(moved["subject"]), rel=1e-3)
    curves = report["by_timestep"]
    assert curves["timestep"] == [250.0, 750.0]
    assert curves["drift"][1] == pytest.approx(mean((after["subject"] - before["class"])[6:]), rel=1e-3)
    # The strength is where the class has moved by the budget, in real predictions on both sides.
    strength, halves = report["strength"], (report["strength"]["within"], report["strength"]["passes_at"])
    for value, inside in zip(halves, (True, False)) if halves[1] else ():
        with adapter.scaled(value):
            assert (mean(predictions("class") - before["class"]) / effect <= strength["budget"]) is inside
    suggested = report["suggested"]
    with adapter.scaled(suggested["strength"]):
        full = predictions("class") - before["class"]
    for weak, told in suggested["tried"]:
        with adapter.scaled(weak * suggested["strength"]):
            guided = 5 * full - 4 * (predictions("empty") - before["empty"])
        assert told == pytest.approx(mean(guided) / effect, rel=1e-3, abs=1e-5)


def test_the_strength_is_between_two_that_were_tried(eps_denoiser, latents, stir):
    tensors = made(eps_denoiser, stir, 0.5)
    settings = CheckupSettings(2, 2, seed=4, budget=1e6)
    report = report_of(eps_denoiser, tensors, latents, settings=settings)
    assert report["strength"]["passes_at"] is None and report["suggested"]["strength"] == 1.0
    at_one, at_most = (change for _, change in report["strength"]["tried"][1:])
    for budget in (0.3 * at_one, (at_one + at_most) / 2):
        strength = report_of(eps_denoiser, tensors, latents, settings=CheckupSettings(2, 2, seed=4, budget=budget))[
            "strength"
        ]
        tried = dict(map(tuple, strength["tried"]))
        assert tried[strength["within"]] <= budget < tried[strength["passes_at"]]
        assert strength["passes_at"] - strength["within"] == pytest.approx(1 / 64)
        assert (strength["passes_at"] <= 1) is (budget < at_one)


def test_an_adapter_without_effect_is_told_so(eps_denoiser, latents):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    tensors = to_file_keys(adapter, eps_denoiser.file_keys())
    eps_denoiser.detach()
    report = report_of(eps_denoiser, tensors, latents)
    assert report["without_trigger"]["class"] == {
        "change": 0.0, "of_prediction": 0.0, "of_prompt": 0.0, "of_trigger": None,
    }  # fmt: skip
    assert report["verdict"]["level"] == KEEPS and report["weights"]["norm"] == 0
    assert report["suggested"]["strength"] == 1 and report["suggested"]["weak"] == WEAKS[0]
    json.dumps(report, allow_nan=False)


def test_without_a_trigger_word_the_class_is_still_judged(eps_denoiser, latents, stir):
    tensors = made(eps_denoiser, stir)
    whole, alone = (report_of(eps_denoiser, tensors, latents, prompts) for prompts in (PROMPTS, ALONE))
    assert alone["with_trigger"] is None and "drift" not in alone["by_timestep"]
    assert alone["without_trigger"]["class"] == whole["without_trigger"]["class"] | {"of_trigger": None}
    assert alone["verdict"]["level"] == whole["verdict"]["level"] and alone["strength"] == whole["strength"]


def test_class_pictures_are_made_where_none_are_given(eps_denoiser, stir):
    tensors = made(eps_denoiser, stir)
    settings = CheckupSettings(2, count=2, steps=2)
    one, other = (report_of(eps_denoiser, tensors, None, settings=settings) for _ in range(2))
    assert one == other and one["measured_on"]["pictures"] == 2
    assert "made by the untouched model" in one["measured_on"]["latents"]


@pytest.mark.parametrize(
    "options",
    [{"text_encoder": True}, {"kind": "none", "vectors": 2}, {"vectors": 1}, {"kind": "full", "layers": "norm|to_q"}],
    ids=str,
)
def test_adapters_of_the_text_side_and_of_norms(eps_denoiser, latents, stir, options):
    adapter = eps_denoiser.attach(AdapterConfig(**{"rank": 2, "token": "sks", "initial": "dog", **options}))
    stir(adapter, size=0.05)
    tensors, embedding = to_file_keys(adapter, eps_denoiser.file_keys()), None
    if options.get("vectors") and options.get("kind") != "none":
        from anchor_core.adapters.tokens import to_embedding

        embedding = to_embedding(adapter.tokens)
    eps_denoiser.detach()
    report = check_up(
        eps_denoiser, lambda: attach_tensors(eps_denoiser, tensors, {}, embedding, "sks"), {}, PROMPTS,
        latents=latents, shape=SHAPE, settings=SMALL,
    )  # fmt: skip
    assert report["with_trigger"]["change"] > 0
    if options.get("kind") == "none":
        assert report["without_trigger"]["class"]["change"] < 1e-4 and report["weights"]["layers"] == []
    elif options.get("text_encoder"):
        assert any(layer["block"].startswith("text_encoder") for layer in report["weights"]["layers"])
    checkup_page.draw(report)


def test_it_ends_where_it_is_cancelled(eps_denoiser, latents, stir):
    tensors, seen = made(eps_denoiser, stir), []

    def tick(done: int, of: int) -> None:
        seen.append((done, of))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_of(eps_denoiser, tensors, latents, tick=tick)
    assert eps_denoiser.adapter is None
    seen.clear()
    report_of(eps_denoiser, tensors, latents, tick=lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]


def test_shares_add_up(eps_denoiser, latents, stir):
    weights = report_of(eps_denoiser, made(eps_denoiser, stir, layers="all_linear_conv"), latents)["weights"]
    for part in ("blocks", "layers"):
        assert sum(each["share"] for each in weights[part]) == pytest.approx(1)
    assert {"down_blocks.1", "mid_block", "up_blocks.0"} <= {each["block"] for each in weights["blocks"]}
    assert all(0.99 < layer["effective_rank"] < 2.01 for layer in weights["layers"])  # of rank 2


# --- the page -----------------------------------------------------------------------------------------------------

HOSTILE = {
    "anchor.subject_prompt": '<script>alert("x")</script> $\\frac$ sks dog\x1b[31m',
    "anchor.class_prompt": "</title><img src=http://example.org/x onerror=alert(1)> $_{ dog",
    "modelspec.title": "\u202e<iframe src='//example.org'>",
    "'><svg/onload=alert(1)>": "&lt;not escaped twice&gt;",
}


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.data = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.data.append(data)


def test_a_page_holds_everything_and_runs_nothing(eps_denoiser, latents, stir, tmp_path):
    tensors, prompts = made(eps_denoiser, stir), prompts_of(HOSTILE)
    report = report_of(eps_denoiser, tensors, latents, prompts) | about_file("<b>x</b>.safetensors", HOSTILE)
    figure = checkup_page.draw(report)
    files = [tmp_path / f"report.{ending}" for ending in ("json", "html", "png")]
    checkup_page.save(report, figure, *files)
    assert json.loads(files[0].read_text()) == report and files[2].read_bytes().startswith(b"\x89PNG")
    text = files[1].read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "strong", "ul", "li", "img", "table", "tr",
        "th", "td",
    }  # fmt: skip
    (picture,) = (given for tag, given in page.tags if tag == "img")
    assert picture.keys() == {"alt", "src"} and picture["src"].startswith("data:image/png;base64,")
    assert not any(name.startswith("on") or name == "href" for _, given in page.tags for name in given)
    assert "default-src 'none'" in text and "\x1b" not in text and "\u202e" not in text
    shown = "".join(page.data)
    assert '<script>alert("x")</script>' in shown and "&lt;not escaped twice&gt;" in shown
    assert re.search(r"harms the class|changes the class|keeps the class", shown)


def test_the_marks_of_the_verdict(eps_denoiser, latents, stir):
    """By the strength of one adapter, whose words follow its numbers."""
    tensors, seen = made(eps_denoiser, stir, 0.4), {}
    for scale in (0.02, 0.3, 3.0):
        scaled = {key: scale * tensor if key.endswith("lora_up.weight") else tensor for key, tensor in tensors.items()}
        report = report_of(eps_denoiser, scaled, latents)
        seen[report["verdict"]["level"]] = report["without_trigger"]["class"]["of_prompt"]
        assert re.search(rf"{seen[report['verdict']['level']]:.2f} times", report["verdict"]["sentences"][0])
    assert seen.keys() >= {KEEPS, HARMS} and seen[HARMS] > HARM and seen[KEEPS] <= BUDGET
    assert set(seen) <= {KEEPS, CHANGES, HARMS}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"timesteps": 0}, "^timesteps is 0"), ({"budget": 0.0}, "^budget is 0"), ({"count": 0}, "^count is 0")],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CheckupSettings(**options)
