"""What the pack adds to ComfyUI's start, in ComfyUI's own interpreter without a GPU or any package of ours."""

from __future__ import annotations

import json
import sys

import pytest

from tests.comfyui import comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

HEAVY = ("anchor_core.backends", "anchor_core.evaluation", "anchor_core.training.run", "anchor_core.training.trainer")
"""Rooms that no list of inputs needs: they are imported when a node runs."""

LIGHT = ("anchor_core.evaluation", "anchor_core.evaluation.settings")
"""What a node lists as inputs of it."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    pack = comfy_server.install_pack(folder / comfy_server.PACK)
    comfy_server.run_script(
        comfy_server.ROOT / "tests/comfyui/check_import.py", pack, folder / "start.json", folder=folder
    )
    return json.loads((folder / "start.json").read_text())


def test_every_node_loads_without_optional_packages(start):
    from tests.nodes.test_nodes import NODES

    assert start["loaded"] and not set(NODES) - set(start["nodes"])


def test_only_our_own_light_modules_come_with_it(start):
    ours = {"", "anchor_core", "nodes", *sys.stdlib_module_names}
    assert [name for name in start["brought"] if name.split(".")[0] not in ours] == []
    assert [name for name in start["brought"] if name.startswith(HEAVY) and name not in LIGHT] == []
