"""docs/LICENSES.md against what pyproject.toml and requirements.txt ask for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_every_package_that_is_asked_for_has_its_licence_listed():
    rows = re.findall(r"^\| (\S+) \| (.+) \| (.+) \|$", (ROOT / "docs/LICENSES.md").read_text("utf-8"), re.MULTILINE)
    listed = {package: licence for package, licence, _ in rows}
    asked = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    assert {name(text) for text in asked} <= listed.keys()
    assert not [package for package, licence in listed.items() if "not said" in licence]


def test_comfyuis_requirements_are_the_projects_without_torch():
    """ComfyUI brings its own torch, which a pack must not replace."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements == [text for text in PROJECT["dependencies"] if name(text) != "torch"]
