"""Pictures of ComfyUI's own loaders, and files that are gone, in a real ComfyUI."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from tests.comfyui import comfy_server
from tests.nodes.graphs import node, training

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.fixture(scope="module")
def server(server):
    """The room's, with pictures of each kind among its inputs."""
    base = server.base
    folder = base / "input/pip"
    folder.mkdir(parents=True)
    for number, size in enumerate([(64, 64), (64, 96), (96, 64)]):
        Image.new("RGB", size, (90 * number, 20, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of a sks star, number {number} (small:1.2)")
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 64, 16))
    clear.save(base / "input/clear.png")
    shutil.copytree(folder, base / "input/odd")
    (base / "input/odd/3.heic").write_bytes(b"no such reader")
    (base / "input/odd/4.png").symlink_to("../clear.png")
    return server


def loras(server, name: str) -> list[str]:
    return sorted(file.name for file in (server.base / "output/loras").glob(f"{name}_*.safetensors"))


def trained_on(name: str, references: dict) -> dict:
    """A prompt that trains on the references (30), and shows the file."""
    prompt = training(steps=1, preview_every=0, name=name)
    del prompt["2"], prompt["4"]["inputs"]["images"]
    prompt["4"]["inputs"]["references"] = ["30", 0]
    return prompt | {"30": node("AnchorImageReferences", size=0, buckets=False) | references} | {
        "5": node("PreviewAny", source=["4", 4])
    }  # fmt: skip


def test_a_list_of_pictures_and_texts_is_one_training(server):
    prompt = trained_on("gathered", {})
    prompt["30"]["inputs"] |= {"images": ["31", 0], "captions": ["31", 1]}
    prompt["31"] = node("LoadImageTextDataSetFromFolder", folder="pip")
    server.run(prompt)
    assert loras(server, "gathered") == ["gathered_00001_.safetensors"]
    prompt["30"]["inputs"]["captions"] = ["32", 0]
    prompt["32"] = node("PrimitiveString", value="a photo of a sks star")
    with pytest.raises(RuntimeError, match="captions has 1 entries, but it takes one for each of 3 pictures"):
        server.run(prompt)
    prompt["30"]["inputs"] |= {"captions": ["31", 1], "size": ["33", 0]}
    prompt["33"] = node("PrimitiveInt", value=0)
    server.run(prompt)


def test_the_mask_of_load_image_is_inverted(server):
    prompt = trained_on("masked", {})
    prompt["30"]["inputs"] |= {"images": ["31", 0], "masks": ["31", 1], "invert_masks": True}
    prompt["31"] = node("LoadImage", image="clear.png")
    for inverted, share in ((True, 75), (False, 25)):
        prompt["30"]["inputs"]["invert_masks"] = inverted
        log = len(server.log.read_text())
        server.run(prompt)
        assert f"the loss counts in {share} % of the pixels of images" in server.log.read_text()[log:]


def test_a_list_of_pictures_is_one_comparison(server):
    prompt = {
        "1": node("AnchorLoadReferences", references="pip", size=64),
        "2": node("LoadImageDataSetFromFolder", folder="pip"),
        "3": node(
            "AnchorCompare", references=["1", 1], names="listed", prompts="a photo of a star", token="sks",
            clip="sandbox", dino="sandbox", **{"pictures.system0": ["2", 0]},
        ),
        "4": node("PreviewAny", source=["3", 0]),
    }  # fmt: skip
    (table,) = server.run(prompt)["3"]["text"]
    assert table.count("listed") == 1


def test_what_is_left_out_is_shown_by_the_node(server):
    prompt = {
        "1": node("AnchorLoadReferences", references="odd", size=64, buckets=True),
        "2": node("PreviewImage", images=["1", 0]),
    }
    (text,) = server.run(prompt)["1"]["text"]
    assert "3.heic: no picture of a format that is read" in text and "4.png: a link that leads" in text
    assert "3.heic (no picture of a format that is read)" in server.log.read_text()


def test_a_file_that_is_gone_is_written_again(server):
    prompt = training(steps=1, preview_every=0, name="trained")
    prompt["6"] = node("AnchorSaveAdapter", lora=["4", 1], name="saved")
    server.run(prompt)
    file = server.base / "output/loras/saved_00001_.safetensors"
    before = file.read_bytes()
    server.run(prompt)
    assert loras(server, "saved") == ["saved_00001_.safetensors"]
    file.unlink()
    server.run(prompt)
    assert file.read_bytes() == before
    server.run(prompt)
    assert loras(server, "saved") == ["saved_00001_.safetensors"]
    assert loras(server, "trained") == ["trained_00001_.safetensors"]


def test_a_list_of_pictures_is_one_drift_report(server):
    prompt = training(steps=1, preview_every=0, name="drifted")
    measured = {name: prompt["4"]["inputs"][name] for name in ("model", "clip", "vae", "concept")}
    measured |= {"lora": ["4", 1], "timesteps": 1, "noises": 1, "seed": 0, "images": ["7", 0]}
    prompt |= {"6": node("AnchorDriftReport", **measured), "8": node("PreviewAny", source=["6", 1])}
    prompt["7"] = node("LoadImageDataSetFromFolder", folder="one_size")
    folder = server.base / "input/one_size"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (90 * number, 20, 200)).save(folder / f"{number}.png")
    assert len(server.run(prompt)["6"]["text"]) == 1
