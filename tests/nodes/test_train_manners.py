"""What the training node does with lists, with Load Image's masks, and with a file that is gone or was taken."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from tests.comfyui import comfy_server
from tests.nodes.graphs import node, training

pytestmark = pytest.mark.skipif(isinstance(comfy_server.find(), str), reason=str(comfy_server.find()))


def short(name: str, **changes) -> dict:
    return training(steps=1, preview_every=0, name=name, **changes) | {"5": node("PreviewAny", source=["4", 4])}


def loras(server, name: str) -> list[str]:
    return sorted(file.name for file in (server.base / "output/loras").glob(f"{name}_*.safetensors"))


def test_a_list_of_pictures_of_several_sizes_is_one_training(server):
    folder = server.base / "input/listed"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 96), (96, 64)]):
        Image.new("RGB", size, (90 * number, 20, 200)).save(folder / f"{number}.png")
    prompt = short("listed", images=["7", 0]) | {"7": node("LoadImageDataSetFromFolder", folder="listed")}
    server.run(prompt)
    assert loras(server, "listed") == ["listed_00001_.safetensors"]
    prompt |= {"8": node("LoadImageTextDataSetFromFolder", folder="listed")}
    prompt["4"]["inputs"]["name"] = ["8", 1]
    with pytest.raises(RuntimeError, match="name is a list of 3, but it takes one"):
        server.run(prompt)


def test_the_mask_of_load_image_is_inverted(server):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 64, 16))
    clear.save(server.base / "input/quarter.png")
    said = "the loss counts in 75 % of the pixels of images"
    before = server.log.read_text().count(said)
    prompt = short("masked", images=["7", 0], masks=["7", 1], invert_masks=True)
    server.run(prompt | {"7": node("LoadImage", image="quarter.png")})
    assert server.log.read_text().count(said) == before + 1


def test_a_lora_that_was_deleted_is_trained_again_once(server):
    prompt = short("gone")
    server.run(prompt)
    file = server.base / "output/loras/gone_00001_.safetensors"
    trained = file.read_bytes()
    server.run(prompt)
    file.unlink()
    server.run(prompt)
    assert file.read_bytes() == trained
    server.run(prompt)
    assert loras(server, "gone") == [file.name]


def test_vectors_are_where_their_word_says(server):
    options = {"6": node("AnchorTrainOptions", **defaults(server, kind="lora", vectors=1))}
    prompt = short("word", options=["6", 0]) | options
    prompt["9"] = node("PreviewAny", source=["4", 6])
    (word,) = server.run(prompt)["9"]["text"]
    assert (server.base / "models/embeddings" / f"{word.removeprefix('embedding:')}.safetensors").is_file()


def defaults(server, **changes) -> dict:
    """Train Options as it is put on the canvas, with some changes."""
    info = server.get("/object_info/AnchorTrainOptions")["AnchorTrainOptions"]["input"]["required"]
    values = {name: spec[1]["default"] if "default" in spec[1] else spec[0][0] for name, spec in info.items()}
    return values | changes


def test_a_file_of_the_name_that_comes_meanwhile_stays(server):
    prompt = short("taken")
    prompt["4"]["inputs"]["steps"] = 40
    identity = server.queue(prompt)
    while "step 1 of 40" not in server.log.read_text():
        time.sleep(0.05)
    other = server.base / "output/loras/taken_00001_.safetensors"
    other.write_bytes(b"another's")
    entry = server.wait(identity)
    assert comfy_server.failure(entry) is None
    assert other.read_bytes() == b"another's"
    assert entry["outputs"]["5"]["text"][0].endswith("taken_00002_.safetensors")
