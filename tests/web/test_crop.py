"""The frame that the page draws is what Python cuts."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import pytest
from PIL import Image

from anchor_core.data.pictures import bucket_sizes, cut, load_references
from anchor_core.data.reading import FORMATS
from tests.comfyui.comfy_server import ROOT

NODE = shutil.which("node") or ""
pytestmark = pytest.mark.skipif(not NODE, reason="no node: install Node.js 20 or newer")
SCRIPT = """
import { bucketSizes, crop, sizesOf } from "{web}/crop.mjs"
import { isPicture } from "{web}/pictures.mjs"
import { readFileSync } from "node:fs"
const { resolutions, cases, names } = JSON.parse(readFileSync(0))
console.log(JSON.stringify({
  pictures: names.filter(isPicture),
  sizes: resolutions.map(bucketSizes),
  crops: cases.map(([width, height, size, buckets]) => crop(width, height, sizesOf(size, buckets))),
}))
"""
RESOLUTIONS = [64, 128, 256, 512, 640, 768, 1024, 1536]


def of_the_page(resolutions: list[int] = (), cases: list[tuple] = (), names: list[str] = ()) -> dict:
    script = SCRIPT.replace("{web}", (ROOT / "web").as_uri())
    given = json.dumps({"resolutions": resolutions, "cases": cases, "names": names})
    done = subprocess.run([NODE, "--input-type=module", "-e", script], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of_python(width: int, height: int, size: int, buckets: bool) -> dict:
    """As `read_reference` cuts."""
    target, box = cut(width, height, bucket_sizes(size) if buckets else [(size, size)])
    small = box[2] - box[0] < target[1] or box[3] - box[1] < target[0]
    return {"size": list(target), "box": list(box), "enlarged": small}


def test_every_cut_is_pythons():
    chance = random.Random(0)
    edges = [(chance.randint(1, 6000), chance.randint(1, 6000)) for _ in range(3000)]
    edges += [(w, h) for w in range(1, 80) for h in range(1, 80)]  # halves, and buckets that are equally near
    edges = [(w, h) for w, h in edges if max(w, h) <= 4 * min(w, h)]
    cases = [(w, h, chance.choice(RESOLUTIONS), chance.random() < 0.7) for w, h in edges]
    page = of_the_page(RESOLUTIONS, cases)
    assert page["sizes"] == [[list(size) for size in bucket_sizes(resolution)] for resolution in RESOLUTIONS]
    assert len(cases) > 3000
    for case, crop in zip(cases, page["crops"], strict=True):
        assert crop == of_python(*case), case


def test_what_python_refuses_has_no_frame(tmp_path):
    page = of_the_page([100, 0, 65], [(401, 100, 64, False), (400, 100, 64, True)])
    assert page["sizes"] == [None, None, None] and page["crops"][0] is None and page["crops"][1]
    for width, refused in ((401, True), (400, False)):
        Image.new("RGB", (width, 100)).save(tmp_path / "1.png")
        if refused:
            with pytest.raises(ValueError, match="aspect ratio"):
                load_references(tmp_path, 64)
        else:
            load_references(tmp_path, 64)
    with pytest.raises(ValueError, match="multiple of 64"):
        bucket_sizes(100)


def test_the_formats_are_pythons():
    suffixes = [suffix for own in FORMATS.values() for suffix in own]
    read = [f"a{written}" for suffix in suffixes for written in (suffix, suffix.upper())]
    assert of_the_page(names=[*read, "a.heic", "a.svg", "a.txt", "png"])["pictures"] == read
