"""The verb `compare`: pictures of any systems in one table."""

from __future__ import annotations

import json

import pytest

from anchor_core import cli
from tests.evaluation.folders import write


@pytest.fixture(scope="module")
def sandbox_pictures(tmp_path_factory):
    """References of two subjects, an adapter of one, and pictures: copies of the references, and of the other one."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("pip", "momo"):
        assert cli.main(["sandbox", "subject", name, "--out", str(root / "references" / name)]) == 0
        prompts = json.loads((root / "references" / name / "report.json").read_text())["prompts"]
        (root / f"{name}.txt").write_text(prompts[0].replace("sks ", ""))
    for system, of in {"right": {"pip": "pip", "momo": "momo"}, "wrong": {"pip": "momo", "momo": "pip"}}.items():
        for subject, source in of.items():
            (root / system / subject).mkdir(parents=True)
            for file in (root / "references" / source).glob("*.png"):
                (root / system / subject / file.name).write_bytes(file.read_bytes())
                text = (root / f"{subject}.txt").read_text()
                (root / system / subject / f"{file.stem}.txt").write_text(text)
    return root


def compare(root, *more, out="out") -> int:
    pictures = [f"{name}={root / name}" for name in ("wrong", "right")]
    return cli.main(["compare", "--references", str(root / "references"), "--pictures", *pictures,
                     "--out", str(root / out), *map(str, more)])  # fmt: skip


def test_the_verb_ranks_the_right_subject_first(sandbox_pictures, capsys):
    assert compare(sandbox_pictures, "--judge", "sandbox") == 0
    result = json.loads((sandbox_pictures / "out/report.json").read_text())
    assert list(result["systems"]) == ["right", "wrong"] and result["subjects"] == ["momo", "pip"]
    assert result["systems"]["right"]["dino"]["mean"] > 0.8 > result["systems"]["wrong"]["dino"]["mean"]
    assert result["systems"]["right"]["drift"] is None
    assert (sandbox_pictures / "out/report.png").stat().st_size > 5000
    assert capsys.readouterr().out == (sandbox_pictures / "out/report.md").read_text()


def test_the_table_is_not_written_among_the_pictures_that_it_is_of(sandbox_pictures, capsys):
    for out in ("right", "right/pip", "references/momo"):
        before = sorted((sandbox_pictures / out).iterdir())
        assert compare(sandbox_pictures, "--judge", "sandbox", out=out) == 2
        assert "--out: " in capsys.readouterr().err
        assert sorted((sandbox_pictures / out).iterdir()) == before


def test_the_verb_takes_transformers_encoders(sandbox_pictures, encoder_folders):
    clip, dino = encoder_folders / "clip", encoder_folders / "dino"
    assert compare(sandbox_pictures, "--clip", clip, "--dino", dino, "--device", "cpu", out="own") == 0
    result = json.loads((sandbox_pictures / "own/report.json").read_text())
    assert result["encoders"] == {"clip_i": str(clip), "clip_t": str(clip), "dino": str(dino)}
    assert compare(sandbox_pictures, "--dino", dino, out="dino") == 0
    assert "| n/a | n/a |" in (sandbox_pictures / "dino/report.md").read_text().splitlines()[-1]


def test_prompts_are_needed_for_clip_t_alone(encoder_folders, capsys, tmp_path):
    for folder in ("references", "pictures"):
        write(tmp_path / folder, "0.png")
    given = ["compare", "--references", str(tmp_path / "references"), "--pictures", f"own={tmp_path / 'pictures'}"]
    given += ["--out", str(tmp_path / "out")]
    assert cli.main([*given, "--judge", "sandbox"]) == 2
    assert "--prompts: the pictures of own do not tell" in capsys.readouterr().err
    assert cli.main([*given, "--dino", str(encoder_folders / "dino")]) == 0
    assert "| own | n/a | n/a | 1.000 | 1.00 | 1 | n/a |" in capsys.readouterr().out


def test_the_drift_is_that_of_each_systems_adapters(sandbox_pictures, model_folders):
    root, model = sandbox_pictures, ("--model", str(model_folders["epsilon"]), "--device", "cpu")
    drifts = []
    for subject, words in (("pip", "dog"), ("momo", "cat")):
        out, given = root / "adapters" / subject, ("--references", str(root / "references" / subject))
        prompts = ("--subject", f"a photo of a sks {words}", "--class", f"a photo of a {words}")
        train = ("train", *model, *given, *prompts, "--steps", "2", "--learning_rate", "0.02", "--out", str(out))
        assert cli.main([*train]) == 0
        file = str(out / "adapter.safetensors")
        assert cli.main(["inspect", *model, *given, "--adapter", file, "--out", str(root / "inspected")]) == 0
        drifts.append(json.loads((root / "inspected/report.json").read_text())["after"]["drift"])
    adapters = ("--adapters", f"right={root / 'adapters'}", *model)
    assert compare(root, "--judge", "sandbox", *adapters, out="drift") == 0
    systems = json.loads((root / "drift/report.json").read_text())["systems"]
    assert systems["right"]["drift"]["mean"] == pytest.approx(sum(drifts) / 2, rel=1e-5)
    assert systems["wrong"]["drift"] is None


@pytest.mark.parametrize(
    "given, message",
    [
        ((), "--clip: the encoders are"),
        (("--judge", "sandbox", "--dino", "x"), "--clip: the encoders are"),
        (("--judge", "sandbox", "--pictures", "right"), "--pictures: 'right' is no NAME=PATH"),
        (("--judge", "sandbox", "--adapters", "other=x"), "--adapters: 'other' has no pictures"),
        (("--judge", "sandbox", "--adapters", "right=x"), "give --model"),
        (("--judge", "sandbox", "--adapters", "right=x", "--model", "sandbox"), "--adapters: adapters of right"),
        (("--judge", "sandbox", "--prompts", "nowhere.txt"), "--prompts: prompts is 'nowhere.txt'"),
        (("--dino", "no/such/folder"), "--dino: dino is 'no/such/folder'"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(sandbox_pictures, capsys, given, message):
    assert compare(sandbox_pictures, *given, out="refused") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (sandbox_pictures / "refused").exists()
