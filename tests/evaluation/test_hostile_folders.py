"""Folders of a comparison that strangers made: links, deep and long files, odd names."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from anchor_core.evaluation.picture_folders import MAX_BYTES, gather, read_prompts


@pytest.fixture
def folders(tmp_path):
    """References and pictures of one system, of the subjects dog and cat."""
    for name in ("references", "made"):
        for subject in ("dog", "cat"):
            (tmp_path / name / subject).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / subject / "1.png")
    return tmp_path


def gathered(folders):
    return gather(folders / "references", {"ours": str(folders / "made")}, None, "sks")


def test_subjects_by_links_and_hidden_ones_do_not_count(folders):
    (folders / "references/.git").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "references/.git/1.png")
    try:
        (folders / "references/linked").symlink_to(folders / "made/dog", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no symbolic links without rights")
    assert gathered(folders).keys() == {"dog", "cat"}


@pytest.mark.parametrize(
    "report",
    [
        "[" * 100_000,
        '{"pictures": ' * 50_000,
        " " * (MAX_BYTES + 1),
        "\0",
        '{"pictures": [{"file": "\x1b[2J", "prompt": ""}]}',
    ],
)
def test_a_report_that_cannot_be_read_is_named(folders, report):
    (folders / "made/dog/report.json").write_text(report)
    with pytest.raises(ValueError, match=r"report\.json") as caught:
        gathered(folders)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_report_by_a_link_is_not_followed(folders):
    secret = folders / "secret.json"
    secret.write_text(json.dumps({"pictures": [{"file": "1.png", "prompt": "a secret"}]}))
    (folders / "made/dog/report.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"report\.json cannot be read .*a link that leads out of the folder"):
        gathered(folders)


def test_prompts_of_many_megabytes_are_refused(tmp_path):
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(1 << 33)  # takes no room on the disk
    with pytest.raises(ValueError, match="^prompts is .* cannot be read .*it has more than"):
        read_prompts(tmp_path / "prompts.txt")
