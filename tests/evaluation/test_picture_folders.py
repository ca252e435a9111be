"""How pictures find their prompts, and which folders do not fit."""

from __future__ import annotations

import json
import re

import pytest

from anchor_core.evaluation.picture_folders import class_only, gather, in_order, read_prompts
from tests.evaluation.folders import write

DREAMBENCH = """Classes

subject_name,class
cat2,cat
bear_plushie,stuffed animal

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]
Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def test_prompts_of_dreambench_and_of_a_plain_file(tmp_path):
    (tmp_path / "dreambench.txt").write_text(DREAMBENCH)
    of = read_prompts(tmp_path / "dreambench.txt")
    assert of("bear_plushie") == ["a stuffed animal in the jungle", "a cube shaped stuffed animal"]
    assert of("cat2") == ["a cat wearing a red hat"]
    with pytest.raises(ValueError, match="no subject 'dog', but cat2, bear_plushie"):
        of("dog")
    (tmp_path / "plain.txt").write_text("a dog\n\na red dog\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "plain.txt")("any") == ["a dog", "a red dog"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "is empty"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)


def test_the_token_alone_is_taken_out():
    assert class_only("a photo of a sks dog, sks and sksy", "sks") == "a photo of a dog, and sksy"
    assert class_only("a <new1> dog", "<new1>") == "a dog"
    assert class_only("a  dog", "") == "a dog"


def test_each_prompt_has_as_many_pictures():
    assert in_order(["a", "b"], 4, "x") == ["a", "a", "b", "b"]
    for prompts, count in ((["a", "b"], 3), ([], 3)):
        with pytest.raises(ValueError, match="x has 3 pictures"):
            in_order(prompts, count, "x")


def test_pictures_find_their_prompts(tmp_path):
    write(tmp_path / "references", "0.png", "1.png")
    write(tmp_path / "listed", "b.png", "a.png", **{"b": "not read"})
    entries = [{"file": "b.png", "prompt": "a sks cat"}, {"file": "a.png", "prompt": "a dog"}]
    (tmp_path / "listed/report.json").write_text(json.dumps({"pictures": entries}))
    write(tmp_path / "texts", "x.png", "y.png", x="a sks dog", y="a cat")
    write(tmp_path / "numbered", "1_0.png", "0_0.png", "0_1.png", "1-10.png")
    write(tmp_path / "ordered", *(f"{number}.png" for number in (2, 1, 10, 3)))
    (tmp_path / "prompts.txt").write_text("first\nsecond sks\n")
    systems = {name: str(tmp_path / name) for name in ("listed", "texts", "numbered", "ordered")}
    (files,) = gather(tmp_path / "references", systems, tmp_path / "prompts.txt", "sks").values()
    found = {system: [(file.name, text) for file, text in zip(*made)] for system, made in files.made.items()}
    assert found["listed"] == [("a.png", "a dog"), ("b.png", "a cat")]
    assert found["texts"] == [("x.png", "a dog"), ("y.png", "a cat")]
    numbered = [("0_0.png", "first"), ("0_1.png", "first"), ("1-10.png", "second"), ("1_0.png", "second")]
    assert sorted(found["numbered"]) == numbered
    assert [name for name, _ in found["ordered"]] == ["1.png", "2.png", "3.png", "10.png"]
    assert [text for _, text in found["ordered"]] == ["first", "first", "second", "second"]
    assert [file.name for file in files.references] == ["0.png", "1.png"]


def test_mismatches_name_the_system(tmp_path):
    references, prompts = tmp_path / "references", tmp_path / "prompts.txt"
    for subject in ("dog", "cat"):
        write(references / subject, "0.png")
        write(tmp_path / "good" / subject, "0_0.png", "1_0.png")
    prompts.write_text("first\nsecond\n")
    write(tmp_path / "lacks/dog", "0_0.png", "1_0.png")
    write(tmp_path / "other/bird", "0.png")
    for subject in ("dog", "cat"):
        write(tmp_path / "odd" / subject, "a.png", "b.png", "c.png")
        write(tmp_path / "latin" / subject, "a.png")
        (tmp_path / "latin" / subject / "a.txt").write_bytes("a caf\u00e9".encode("latin-1"))
        write(tmp_path / "strange" / subject, "a.png")
        (tmp_path / "strange" / subject / "report.json").write_text(json.dumps({"pictures": [1]}))
    for name, message in {
        "lacks": "'cat' is in one alone",
        "other": "have no subject of the references",
        "odd": "has 3 pictures, but it takes as many for each of 2 prompts",
        "latin": "none of .* has a prompt",
        "strange": "none of .* has a prompt",
        "none": "which is no folder",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            gather(references, {"good": str(tmp_path / "good"), name: str(tmp_path / name)}, prompts, "sks")
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_has_no_prompt_no_picture_or_no_references_is_named_and_left_out(tmp_path):
    write(tmp_path / "references/dog", "0.png")
    (tmp_path / "prompts.txt").write_text("first\nsecond\n")
    made = tmp_path / "made"
    write(made / "more/dog", "2_0.png", "0_0.png", "1_0.png")
    write(made / "few/dog", "0_0.png")
    write(made / "texts/dog", "a.png", "b.png", "c.png", a="a dog")
    (made / "texts/dog/c.txt").write_bytes("a caf\u00e9".encode("latin-1"))
    write(made / "gone/dog", "0.png", "2.png")
    entries = [{"file": "1.png", "prompt": "a dog"}, {"file": "2.png", "prompt": "a dog"}]
    (made / "gone/dog/report.json").write_text(json.dumps({"pictures": entries}))
    write(made / "bird/dog", "0_0.png", "1_0.png")
    write(made / "bird/bird", "0_0.png", "1_0.png")
    left_out: list[str] = []
    systems = {name: str(made / name) for name in ("more", "few", "texts", "gone", "bird")}
    found = gather(tmp_path / "references", systems, tmp_path / "prompts.txt", "sks", left_out)
    kept = {name: [file.name for file in files] for name, (files, _) in found["dog"].made.items()}
    assert kept == {
        "more": ["0_0.png", "1_0.png"], "few": ["0_0.png"], "texts": ["a.png"], "gone": ["2.png"],
        "bird": ["0_0.png", "1_0.png"],
    }  # fmt: skip
    assert len(left_out) == 7
    for told in (
        "bird of bird: it has no references",
        "2_0.png of more: it has no prompt",
        "prompt 1 of few: it has no picture",
        "b.png of texts: it has no prompt",
        "c.png of texts: .*c.txt cannot be read",
        "0.png of gone: it has no prompt",
        "1.png of gone: report.json tells of it, but it is not there",
    ):
        assert [line for line in left_out if re.search(told, line)], told
    assert gather(tmp_path / "references", {}, None, "sks").keys() == {"dog"}
