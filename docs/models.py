"""Writes docs/MODELS.md from a sweep over the models that ComfyUI knows (`tests/comfyui/check_sweep.py`).

Usage: python docs/models.py [SWEEP.json]; without a sweep at hand it is run first, which takes some minutes. ComfyUI is
found as the tests find it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Which models train

Every class of models that ComfyUI {version} knows, with the kinds of files that a class may be. Made by `python
docs/models.py`, which builds each at tiny size under ComfyUI's own classes and runs the main checks of the contract
on it: the prediction agrees with ComfyUI's own sampling code, the gradient is the slope of the loss, the anchor is
the pretrained prediction, the LoRA's file loads in the stock loader and predicts the same there, the base stays
untouched. It says nothing of quality at full size.

- **Inpainting, fill and control models** have further input channels. They train on what ComfyUI gives them where
  nothing is connected: an empty picture, and a mask of everything. Such a model is marked *empty picture*.
- **Edit models** (Flux Kontext, Flux.2, Qwen-Image-Edit, OmniGen2, ...) train without a reference picture.
- **Models whose latents have frames**, which video models and some image models have, train on pictures as videos of
  one frame. Such a model is marked *one frame*.
- **Checkpointing** says whether gradient checkpointing is known for the network; without it a large one needs much
  memory.
- A model that is refused is refused before anything is encoded or written, with the sentence that stands here.

"""


def name(found: dict[str, Any]) -> str:
    return f"`{found['class']}`" + (f" ({found['kind']})" if found["kind"] else "")


def write(sweep: list[dict[str, Any]], version: str) -> str:
    """The page. AssertionError if a model that trains failed a check."""
    trained, refused = [], []
    for found in sweep:
        wrong = [check for check, message in found.get("checks", {}).items() if message]
        assert not wrong, f"{name(found)} fails {', '.join(wrong)}"
        if "refused" in found:
            refused.append(f"| {name(found)} | {found['refused']} |")
        else:
            notes = [
                note for note, holds in (("one frame", "frames"), ("empty picture", "concatenates")) if found[holds]
            ]
            checkpointing = "yes" if found["checkpointing"] else "no"
            predicts = found["predicts"].removesuffix("_prediction")
            trained.append(
                f"| {name(found)} | {found['network']} | {predicts} | {checkpointing} | {', '.join(notes)} |"
            )
    rows = ["| class | network | predicts | checkpointing | |", "|---|---|---|---|---|", *trained]
    rows += ["", "## Refused", "", "| class | what is said |", "|---|---|", *refused]
    return HEAD.format(version=version) + "## Trains\n\n" + "\n".join(rows) + "\n"


def comfyui_version(comfyui: Path) -> str:
    return (comfyui / "comfyui_version.py").read_text().split('"')[1]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.comfyui import comfy_server

    found = comfy_server.find()
    if isinstance(found, str):
        sys.exit(found)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "sweep.json"
        if len(sys.argv) == 1:
            script = ROOT / "tests" / "comfyui" / "check_sweep.py"
            comfy_server.run_script(script, ROOT, file, folder=Path(folder))
        page = write(json.loads(file.read_text()), comfyui_version(found[0]))
    (ROOT / "docs" / "MODELS.md").write_text(page)
