"""Fixtures of this room: a ComfyUI with the pack, one a worker for all files that need nothing else in it."""

from __future__ import annotations

import pytest

from anchor_core.sandbox import model as sandbox
from tests.comfyui import comfy_server


@pytest.fixture(scope="session")
def server(tmp_path_factory, weights):
    """Shared, so a test says what it needs of folders and logs relative to what they held before it."""
    base = tmp_path_factory.mktemp("comfyui")
    pack = comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    if weights != sandbox.WEIGHTS:
        (pack / "anchor_core/sandbox/weights").symlink_to(weights, target_is_directory=True)
    server = comfy_server.ComfyServer(*comfy_server.find(), base)
    yield server
    server.stop()
