"""One folder that holds a whole comparison."""

from __future__ import annotations

import pytest

from anchor_core.evaluation.compare import Comparison
from anchor_core.evaluation.metrics import Encoders
from anchor_core.evaluation.picture_folders import gather_tree
from tests.evaluation.folders import write
from tests.evaluation.test_compare import means
from tests.evaluation.test_picture_folders import DREAMBENCH


def test_the_folders_beside_the_references_are_the_systems(tmp_path):
    tree, elsewhere, left_out = tmp_path / "tree", tmp_path / "elsewhere", []
    write(elsewhere / "cat2", "0_0.png")
    for part in ("references", "ours", ".hidden"):
        write(tree / part / "cat2", "0_0.png")
    write(tree / "ours/bear", "0_0.png")
    (tree / "theirs").symlink_to(elsewhere, target_is_directory=True)
    (tree / "prompts.txt").write_text("not read\n")
    (tree / "prompts_and_classes.txt").write_text(DREAMBENCH)
    subjects, classes = gather_tree(tree, "sks", left_out)
    assert list(subjects) == ["cat2"] and classes == {"cat2": "cat", "bear_plushie": "stuffed animal"}
    assert subjects["cat2"].made == {"ours": ([tree / "ours/cat2/0_0.png"], ["a cat wearing a red hat"])}
    assert left_out == ["bear of ours: it has no references"]


def test_a_folder_of_references_alone_is_a_calibration(tmp_path):
    write(tmp_path / "references/cat", "0.png", "1.png")
    subjects, _ = gather_tree(tmp_path, "", [])
    comparison = Comparison(Encoders(means))
    assert comparison.add_files("cat", subjects["cat"]).keys() == {""} and comparison.subjects == ["cat"]
    assert comparison.result()["real"]["clip_i"]["mean"] == pytest.approx(1)


def test_without_references_there_is_nothing_to_compare_with(tmp_path):
    write(tmp_path / "ours/cat", "0.png")
    with pytest.raises(ValueError, match="which has no folder 'references'; put the real pictures there"):
        gather_tree(tmp_path, "", [])
    comparison = Comparison(Encoders(means), ["cat: no picture of ours can be read"])
    with pytest.raises(ValueError, match="references: of no subject .* cat: no picture of ours"):
        comparison.result()
