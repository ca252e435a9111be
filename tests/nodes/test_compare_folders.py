"""The comparison's node against the command line, on the same files: several subjects, and one on the canvas."""

from __future__ import annotations

import json
import shutil

import numpy
import pytest
from PIL import Image

from anchor_core import cli
from anchor_core.evaluation.metrics import METRICS
from tests.comfyui import comfy_server
from tests.nodes.graphs import node

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

FOLDER, SYSTEMS = "compared", ("ours", "theirs")
AGAIN = "again"
"""The same with the pictures in another order."""
PLACES = ("in the snow", "on a red table", "in the snow on a table")
SETTINGS = {"names": "", "prompts": "", "token": "sks", "clip": "clip", "dino": "dino", "class_word": "dog"}


@pytest.fixture(scope="module")
def folder(server, encoder_folders):
    """Pictures of the systems of three subjects, of which one has no references that can be read, and the encoders."""
    for name in ("clip", "dino"):
        place = server.base / "models/clip_vision" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(encoder_folders / name, target_is_directory=True)
    root, random = server.base / "input" / FOLDER, numpy.random.default_rng(0)
    for part in ("references", "ours", "theirs"):
        for subject in ("rex", "tom", "zed"):
            place = root / part / subject
            place.mkdir(parents=True)
            for number, words in enumerate(PLACES):
                tones = random.integers(0, 255, (8, 8, 3), dtype=numpy.uint8)
                Image.fromarray(tones).resize((64, 64)).save(place / f"{number}.png")
                if part != "references":
                    (place / f"{number}.txt").write_text(f"a photo of a sks dog {words}")
    (root / "ours/tom/1.png").write_bytes(b"no picture")
    (root / "theirs/tom/2.txt").write_text("a photo of a cat")
    for file in (root / "references/zed").iterdir():
        file.write_bytes(b"no picture")
    shutil.copytree(root, root.with_name(AGAIN))
    for last in [*root.with_name(AGAIN).rglob("2.*")]:
        first, aside = last.with_stem("0"), last.with_stem("aside")
        first.rename(aside)
        last.rename(first)
        aside.rename(last)
    return root


@pytest.fixture
def by_node(server, folder):
    """The report of a comparison (3) whose references (1) are those of rex."""

    def run(more=(), **changes) -> dict:
        reals = node("AnchorLoadReferences", references=f"{FOLDER}/references/rex", size=64)
        compare = node("AnchorCompare", references=["1", 1], **SETTINGS | changes)
        outputs = server.run({"1": reals, "3": compare, "4": node("PreviewAny", source=["3", 2]), **dict(more)})
        return json.loads(outputs["4"]["text"][0])

    return run


@pytest.fixture
def by_verb(folder, encoder_folders, tmp_path):
    """The report of the verb, of all subjects or of one."""

    def run(subject: str = "", systems=SYSTEMS) -> dict:
        given = ["compare", "--references", folder / "references" / subject, "--clip", encoder_folders / "clip"]
        given += ["--dino", encoder_folders / "dino", "--device", "cpu", "--class_word", "dog", "--out", tmp_path]
        pictures = [f"{name}={folder / name / subject}" for name in systems]
        assert cli.main([*map(str, given), *(["--pictures", *pictures] if pictures else [])]) == 0
        return json.loads((tmp_path / "report.json").read_text())

    return run


def same(one: dict, other: dict) -> None:
    """Every figure of two reports, to 1e-6."""
    assert one["systems"] and one["systems"].keys() == other["systems"].keys()
    for part in ("real", "systems"):
        assert flat(one[part]) == pytest.approx(flat(other[part]), abs=1e-6)


def flat(tree, path: str = "") -> dict:
    if not isinstance(tree, dict):
        return {path: tree}
    return {inner: value for name, part in tree.items() for inner, value in flat(part, f"{path}/{name}").items()}


def test_a_folder_of_subjects_is_what_the_command_line_has(by_node, by_verb):
    ours, theirs = by_node(folder=FOLDER), by_verb()
    assert ours["subjects"] == theirs["subjects"] == ["rex", "tom"]
    same(ours, theirs)
    assert ours["systems"]["ours"]["clip_t_parts"]["context"]["mean"]
    assert ours["systems"]["ours"]["dino"]["low"] < ours["systems"]["ours"]["dino"]["high"]
    assert sorted(ours["left_out"]) == sorted(theirs["left_out"])
    for said in ("1.png of ours: ", "zed: no picture of the references can be read", "1 prompts of theirs: "):
        assert [line for line in ours["left_out"] if said in line], said


@pytest.fixture
def on_canvas(by_node):
    """As `by_node`, with rex's pictures of each system as a batch."""
    prompts = "\n".join(f"a photo of a sks dog {words}" for words in PLACES)
    inputs = {f"pictures.system{number}": [str(10 + number), 0] for number in range(len(SYSTEMS))}
    loaded = {
        str(10 + number): node("AnchorLoadReferences", references=f"{FOLDER}/{system}/rex", size=64)
        for number, system in enumerate(SYSTEMS)
    }
    inputs |= {"names": "\n".join(SYSTEMS), "prompts": prompts}
    return lambda **changes: by_node(loaded, **inputs, **changes)


def test_one_subject_on_the_canvas_is_too(on_canvas, by_verb):
    told = json.dumps(on_canvas()).replace("[connected]", "rex")
    same(json.loads(told), by_verb("rex"))


def test_the_canvas_has_one_subject_more(on_canvas):
    result = on_canvas(folder=FOLDER)
    assert result["subjects"] == ["rex", "tom", "[connected]"]
    scores = result["systems"]["ours"]["by_subject"]
    assert scores["[connected]"] == pytest.approx(scores["rex"], abs=1e-6)


def test_without_pictures_it_calibrates_the_encoders(by_node, by_verb):
    alone = by_node()
    assert alone["systems"] == {} and alone["real"]["dino"]["by_subject"].keys() == {"[connected]"}
    assert alone["real"]["dino"]["mean"] == pytest.approx(by_verb("rex", systems=())["real"]["dino"]["mean"], abs=1e-6)


def test_scores_depend_on_neither_batch_nor_order_in_half_precision(by_node):
    whole = means(by_node(folder=FOLDER))
    half, *others = (
        means(by_node(folder=folder, encoder_dtype="bf16", encoder_batch=batch))
        for folder, batch in ((FOLDER, 32), (FOLDER, 2), (AGAIN, 32), (AGAIN, 1))
    )
    for other in others:
        assert other == pytest.approx(half, abs=1e-5)
    assert half != whole and half == pytest.approx(whole, abs=2e-2)


def means(report: dict) -> list[float]:
    return [row[metric]["mean"] for row in map(report["systems"].get, SYSTEMS) for metric in METRICS]


def test_a_folder_without_references_is_one_line(by_node):
    with pytest.raises(RuntimeError, match="^folder is 'ours', which has no folder 'references'; put"):
        by_node(folder=f"{FOLDER}/ours")


def test_a_changed_file_is_measured_again(by_node, folder):
    """The last test, as it changes what the others measure."""
    before = by_node(folder=FOLDER)["systems"]["ours"]["dino"]
    (folder / "ours/rex/0.png").write_bytes((folder / "references/rex/0.png").read_bytes())
    assert by_node(folder=FOLDER)["systems"]["ours"]["dino"] != before
