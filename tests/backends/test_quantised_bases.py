"""Training on quantised models, and applying, guiding and inspecting there: ComfyUI's formats, and ComfyUI-GGUF's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.comfyui import check_quantised, comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def gguf_pack() -> Path | None:
    """$COMFYUI_GGUF_PATH, else ComfyUI-GGUF among ComfyUI's custom nodes or beside it."""
    named = os.environ.get("COMFYUI_GGUF_PATH")
    folders = [Path(named)] if named else [found[0] / "custom_nodes/ComfyUI-GGUF", found[0].parent / "ComfyUI-GGUF"]
    return next((folder for folder in folders if (folder / "ops.py").is_file()), None)


def wrong(folder: Path, pack: Path | str, formats: tuple[str, ...], *options: str) -> list[str]:
    told = comfy_server.results_of(check_quantised, folder, str(pack), *options, *formats)
    assert set(told) == set(formats) and all(told.values())
    return [f"{kind}: {text}" for kind, checks in told.items() for text in checks.values() if text]


@pytest.mark.parametrize(
    "formats",
    [check_quantised.SHORT, pytest.param((*check_quantised.LAYOUTS, check_quantised.NATIVE), marks=pytest.mark.long)],
    ids=["short", "all"],
)
def test_mixed_precision(tmp_path, formats):
    assert not wrong(tmp_path, "", formats)


@pytest.mark.parametrize(
    "formats",
    [check_quantised.SHORT_GGUF, pytest.param(check_quantised.GGUF, marks=pytest.mark.long)],
    ids=["short", "all"],
)
def test_gguf(tmp_path, formats):
    pack = gguf_pack()
    if pack is None:
        pytest.skip("no ComfyUI-GGUF: set COMFYUI_GGUF_PATH")
    assert not wrong(tmp_path, pack, formats)


@pytest.mark.parametrize(
    "formats",
    [("nvfp4",), pytest.param(tuple(check_quantised.LAYOUTS), marks=pytest.mark.long)],
    ids=["short", "all"],
)
def test_mixed_precision_in_pages(tmp_path, formats):
    assert not wrong(tmp_path, "", formats, "--paged")


@pytest.mark.parametrize(
    "formats",
    [("Q4_K",), pytest.param(check_quantised.GGUF, marks=pytest.mark.long)],
    ids=["short", "all"],
)
def test_gguf_under_dynamic_vram(tmp_path, formats):
    pack = gguf_pack()
    if pack is None:
        pytest.skip("no ComfyUI-GGUF: set COMFYUI_GGUF_PATH")
    assert not wrong(tmp_path, pack, formats, "--paged")
