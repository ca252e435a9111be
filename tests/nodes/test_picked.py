"""Pictures that a node holds as a list, through the API of a real ComfyUI: found by name and by content, and shown."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.comfyui import comfy_server
from tests.nodes.graphs import node
from tests.nodes.test_runs import ask

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

ROUTE = "/semantic_anchor/pictures"
PICKED = "[pictures on the node]"


def colour(server, name: str, color: str, size: tuple[int, int] = (96, 64), **options) -> dict:
    """A picture among the inputs, as a list names it."""
    file = server.base / "input" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file, **options)
    return named(server, name)


def named(server, name: str) -> dict:
    data = (server.base / "input" / name).read_bytes()
    return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def shown(server, *entries: dict, **inputs) -> list[tuple[int, int, int]]:
    """The middles of the pictures that the node gives."""
    given = {"references": PICKED, "size": 64, "pictures": json.dumps(entries)} | inputs
    prompt = {"1": node("AnchorLoadReferences", **given), "2": node("SaveImage", images=["1", 0], filename_prefix="p")}
    files = server.run(prompt)["2"]["images"]
    pictures = [Image.open(server.base / "output" / file["subfolder"] / file["filename"]) for file in files]
    assert all(picture.size == (64, 64) for picture in pictures)
    return [picture.convert("RGB").getpixel((32, 32)) for picture in pictures]


def look(server, *files: dict) -> list[dict]:
    status, answer = server.post(ROUTE, {"files": files})
    assert status == 200, answer
    return answer["files"]


def test_a_list_is_what_the_node_gives_in_its_order(server):
    red, blue = colour(server, "a/red.png", "red"), colour(server, "blue.png", "blue")
    assert shown(server, blue, {"name": "a/red.png"}) == [(0, 0, 255), (255, 0, 0)]
    assert shown(server, {"sha256": red["sha256"]}, {"name": "blue.png [input]"}) == [(255, 0, 0), (0, 0, 255)]
    assert shown(server, red, references="sandbox/pip") != [(255, 0, 0)]  # which is chosen is said by references alone


def test_a_picture_is_found_by_content_and_no_other_is_taken_for_it(server):
    green = colour(server, "green.png", "lime")
    file = server.base / "input/green.png"
    file.rename(file.with_name("moved.png"))
    assert shown(server, green) == [(0, 255, 0)]
    colour(server, "green.png", "black")  # another one under its name
    assert shown(server, green) == [(0, 255, 0)]
    file.with_name("moved.png").unlink()
    with pytest.raises(RuntimeError, match="picture green.png is not in this ComfyUI's input folder; another picture"):
        shown(server, green)
    file.unlink()
    with pytest.raises(RuntimeError, match="picture green.png is not in this ComfyUI's input folder; drop it"):
        shown(server, green)


def test_another_content_under_the_same_name_is_another_training(server):
    colour(server, "same.png", "red")
    assert shown(server, {"name": "same.png"}) == [(255, 0, 0)]
    colour(server, "same.png", "blue")
    os.utime(server.base / "input/same.png", (1, 1))  # older than before
    assert shown(server, {"name": "same.png"}) == [(0, 0, 255)]


def test_errors_name_the_picture_and_nothing_outside_is_read(server, tmp_path):
    colour(server, "long.png", "red", (500, 100))
    (server.base / "input/broken.png").write_bytes(b"no picture")
    (server.base / "output/secret.png").write_bytes((server.base / "input/long.png").read_bytes())
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8), "red").save(outside)
    (server.base / "input/link.png").symlink_to(outside)
    for entries, message in (
        ([{"name": "long.png"}], "long.png is 500x100, of aspect ratio 5:1"),
        ([{"name": "broken.png"}], "broken.png cannot be read"),
        ([{"name": "nothing.png"}], "picture nothing.png is not in this ComfyUI's input folder"),
        ([{"name": "../output/secret.png"}], "Invalid file path"),
        ([{"name": "secret.png [output]"}], "picture 'secret.png .output.' is not in ComfyUI's input folder"),
        ([{"name": str(outside)}], "Invalid file path"),
        ([{"name": "link.png"}], "Invalid file path"),
        ([{"sha256": hashlib.sha256(outside.read_bytes()).hexdigest()}], "is not in this ComfyUI"),
        ([{"name": "long.png", "mask": {"name": "no.png"}}], "mask of long.png, no.png is not in this ComfyUI"),
        ([], "pictures is empty; put 3 to 20"),
        ([1], "pictures entry 1 is '1', but it takes an object"),
    ):
        with pytest.raises(RuntimeError, match=message):
            shown(server, *entries)
    (server.base / "input/link.png").unlink()


def test_the_page_is_told_what_there_is(server):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    turned = colour(server, "turned.jpg", "red", (96, 64), exif=exif)
    mask = Image.new("RGBA", (64, 96), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 24))
    mask.save(server.base / "input/mask.png")
    own, painted, gone, odd = look(
        server, turned, named(server, "mask.png") | {"as": "mask"}, {"sha256": "0" * 64}, {"name": "../x.png"}
    )
    assert {name: own[name] for name in ("name", "width", "height", "turned")} == {
        "name": "turned.jpg", "width": 64, "height": 96, "turned": True,
    }  # fmt: skip
    assert (painted["share"], painted["width"], painted["turned"]) == (0.25, 64, False)
    assert gone["missing"] and odd["missing"] and odd["why"].startswith("Invalid file path")
    for view, size in (("picture", (64, 96)), ("mask", (64, 96))):
        sha256 = (own if view == "picture" else painted)["sha256"]
        status, data = ask(server, f"{ROUTE}/{sha256}/{view}")
        assert status == 200 and Image.open(io.BytesIO(data)).size == size and data[:2] == b"\xff\xd8"


def test_only_own_pages_are_answered_and_only_pictures_are_shown(server):
    red = colour(server, "a/red.png", "red")
    Path(server.base / "input/notes.txt").write_text("text")
    text = named(server, "notes.txt")["sha256"]
    one = f"{ROUTE}/{red['sha256']}/picture"
    asked = {"body": json.dumps({"files": [red]}).encode(), "Content_Type": "application/json"}
    assert ask(server, one)[0] == 200 and ask(server, ROUTE, "POST", **asked)[0] == 200
    for foreign in ({"Sec_Fetch_Site": "cross-site"}, {"Origin": "http://evil.example"}):
        assert ask(server, one, **foreign)[0] == ask(server, ROUTE, "POST", **asked, **foreign)[0] == 403
    assert ask(server, ROUTE, "POST", asked["body"], Content_Type="text/plain")[0] == 415
    assert ask(server, one, "POST", b"{}")[0] == 405 and ask(server, ROUTE)[0] in (404, 405)
    for path in (
        f"{'0' * 64}/picture", f"{red['sha256']}/other", f"{text}/picture", "red.png/picture", "..%2Fred.png/picture",
    ):  # fmt: skip
        assert ask(server, f"{ROUTE}/{path}")[0] == 404, path
    for files in (None, {}, [{"path": "/x"}], [red | {"as": "x"}], ["red.png"]):
        status, answer = server.post(ROUTE, {"files": files})
        assert status == 400 and answer["error"].startswith("files"), answer
