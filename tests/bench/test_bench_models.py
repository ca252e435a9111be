"""The runner on SD1.5, SDXL and SD3 at tiny size, with a folder in DreamBench's layout."""

from __future__ import annotations

import json

import pytest

from anchor_core import cli
from anchor_core.bench import runner
from anchor_core.bench.config import parse
from anchor_core.bench.subjects import fingerprint
from tests.backends.tiny_models import build
from tests.bench.dreambench import write_dreambench
from tests.evaluation.tiny_encoders import save_encoders


@pytest.fixture(scope="module")
def dreambench(tmp_path_factory):
    return write_dreambench(tmp_path_factory.mktemp("dreambench"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def small(folder, dreambench, encoders) -> dict:
    return {
        "model": str(folder),
        "training": {"steps": 1, "probe_every": 1, "rank": 2, "learning_rate": 1e-2, "class_pictures": 2},
        "sampling": {"steps": 2, "count": 2, "batch": 3},
        "probe": {"timesteps": 1, "noises": 1, "class_pictures": 2},
        "source": {
            "references": str(dreambench), "prompts": str(dreambench / "prompts_and_classes.txt"), "resolution": 64,
            "clip": str(encoders / "clip"), "dino": str(encoders / "dino"),
        },
        "trainings": {"anchored": {"objective": "anchor", "w": 0.5}, "prior": {"objective": "prior_preservation"}},
        "samplings": {"guided": {"of": ["anchored"], "rule": "personalization"}},
    }  # fmt: skip


def test_cells_go_on_beside_a_new_card_and_not_on_other_weights(dreambench, encoders, tmp_path):
    folder = tmp_path / "model"
    build("sd1", tmp_path).save_pretrained(folder)
    config = parse(small(folder, dreambench, encoders))
    before = fingerprint(config, ["cat2"])
    (folder / "training.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    assert fingerprint(config, ["cat2"]) == before
    for part in ("vae/config.json", "model_index.json", "unet/config.json"):
        file = folder / part
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert fingerprint(config, ["cat2"])["model"] != before["model"], part
        file.write_bytes(content)
    assert fingerprint(config, ["cat2"]) == before


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_a_row_of_dreambench_is_made_and_compared(family, dreambench, encoders, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    build(family, tmp_path).save_pretrained(folder)
    raw = small(folder, dreambench, encoders)
    if family != "sd1":
        raw["trainings"].pop("prior")
    runner.run(parse(raw), out, jobs=1)
    cells = [json.loads(file.read_text()) for file in (out / "cells").rglob("*.json")]
    assert len(cells) == 2 * len(parse(raw).rows)
    for cell in cells:
        (end,) = cell["scores"].values()
        assert set(end) == {
            "subject_fidelity", "picture_similarity", "text_alignment", "drift", "drift_class"
        }  # fmt: skip
        prompts = {"cat2": 3, "duck_toy": 2}[cell["subject"]]
        assert len(cell["by_picture"]["text_alignment"]) == 2 * prompts
    (pictures,) = [each for each in (out / "pictures").iterdir() if each.name.startswith("anchored-")]
    assert len(list((pictures / "0" / "cat2").glob("*.png"))) == 6
    # The same figures by `compare`, from the pictures alone.
    compare = [
        "compare", "--references", str(dreambench), "--pictures", f"ours={pictures / '0'}", "--clip",
        str(encoders / "clip"), "--dino", str(encoders / "dino"), "--prompts",
        str(dreambench / "prompts_and_classes.txt"), "--out", str(tmp_path / "table"),
    ]  # fmt: skip
    assert cli.main(compare) == 0
    told = json.loads((tmp_path / "table" / "report.json").read_text())["systems"]["ours"]["by_subject"]
    for cell in cells:
        if cell["row"] == "anchored":
            (end,) = cell["scores"].values()
            assert told[cell["subject"]]["clip_t"] == pytest.approx(end["text_alignment"], abs=1e-5)


def test_a_broken_cell_goes_on_with_the_pictures_that_it_has(dreambench, encoders, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    build("sd1", tmp_path).save_pretrained(folder)
    config = parse(small(folder, dreambench, encoders))
    runner.run(config, out, subjects=["cat2"], rows=["anchored"], jobs=1)
    (file,) = (out / "cells").rglob("*.json")
    first = json.loads(file.read_text())
    file.unlink()
    pictures = sorted((out / "pictures").rglob("*.png"))
    pictures[-1].unlink()
    kept = {picture: picture.stat().st_mtime_ns for picture in pictures[:3]}  # the first batch
    runner.run(config, out, subjects=["cat2"], rows=["anchored"], jobs=1)
    again = json.loads(file.read_text())
    assert again["scores"]["1"] == pytest.approx(first["scores"]["1"], abs=1e-6)
    assert {picture: picture.stat().st_mtime_ns for picture in pictures[:3]} == kept
    changed = small(folder, dreambench, encoders)
    (dreambench / "cat2" / "00.jpg").rename(dreambench / "cat2" / "09.jpg")
    try:
        with pytest.raises(ValueError, match="references of cat2"):
            runner.run(parse(changed), out, jobs=1)
    finally:
        (dreambench / "cat2" / "09.jpg").rename(dreambench / "cat2" / "00.jpg")


def test_a_subject_without_a_class_or_pictures_is_named(dreambench, encoders, tmp_path):
    raw = small(tmp_path, dreambench, encoders)
    with pytest.raises(ValueError, match="goblet"):
        runner.run(parse(raw | {"subjects": ["cat2", "goblet"]}), tmp_path / "out", jobs=1)
    lines = tmp_path / "prompts.txt"
    lines.write_text("a {} in the snow\n")
    raw["source"] |= {"prompts": str(lines)}
    with pytest.raises(ValueError, match="no subject 'cat2'"):
        runner.run(parse(raw), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()
