"""Writes the workflows that come with the pack, and the subgraph blueprint, from the nodes of a running ComfyUI.

    python -m tests.workflows.make            (COMFYUI_PATH as for the tests)

The JSON files are the product; this keeps them in step when a node gets another input.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from tests.comfyui import comfy_server
from tests.workflows import with_models, without_download
from tests.workflows.blueprint import blueprint
from tests.workflows.graph import Graph

ROOT = comfy_server.ROOT
FOLDER, SUBGRAPHS = ROOT / "example_workflows", ROOT / "subgraphs"


def written(object_info: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Every file of the two folders with what it holds."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    files = {}
    for title, write in (without_download.WORKFLOWS | with_models.WORKFLOWS).items():
        graph = Graph(object_info, version)
        write(graph)
        files[FOLDER / f"{title}.json"] = graph.json(title, as_app="as an app" in title)
    return files | {SUBGRAPHS / "Train a subject.json": blueprint(object_info, version)}


def main() -> None:
    with tempfile.TemporaryDirectory() as base:
        comfy_server.install_pack(Path(base) / "custom_nodes" / comfy_server.PACK)
        server = comfy_server.ComfyServer(*comfy_server.find(), Path(base))
        try:
            object_info = server.get("/object_info")
        finally:
            server.stop()
    for file, content in written(object_info).items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
