"""A folder laid out as DreamBench's, with subjects of two kinds, for tiny models."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

PROMPTS = """Classes

subject_name,class
cat2,cat
duck_toy,toy

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""


def write_dreambench(folder: Path) -> Path:
    """`cat2` with three live prompts and `duck_toy` with two of objects, and `prompts_and_classes.txt`."""
    for number, name in enumerate(("cat2", "duck_toy")):
        (folder / name).mkdir(parents=True)
        for each in range(3):
            picture = Image.new("RGB", (80, 64), (40 + 60 * number, 90, 30 * each))
            ImageDraw.Draw(picture).ellipse((20 + 4 * each, 10, 50, 50), fill=(250, 200 - 90 * number, 40))
            picture.save(folder / name / f"{each:02}.jpg")
    (folder / "prompts_and_classes.txt").write_text(PROMPTS)
    return folder
