"""What the registry gets: the files of `comfy node pack`, and that nothing in them is known to hold a version back."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.test_house import MODULES, ROOT, shipped

pytestmark = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="comfy node pack asks git, and this is no checkout"
)

LIMIT_MB = 25
TEXTS = (".py", ".js", ".mjs", ".css", ".json", ".md", ".toml", ".txt", ".yml", ".svg")
FLAGGED = {
    "processes": r"\bsubprocess\b|os\.system|os\.popen|\bpexpect\b|shell\s*=\s*True",
    "the environment": r"os\.environ|os\.getenv|os\.putenv|process\.env",
    "the network": r"\bimport (socket|urllib|requests|httpx|ftplib)|\burlopen\b|\bsendall\b|\.connect\(|\.send\(",
    "code from data": r"(?<![.\w])(eval|exec|__import__)\(|\bimport (pickle|marshal|importlib|ctypes)\b|new Function\(",
    "databases": r"\bimport (sqlite3|psycopg2|pymysql)\b",
    "a shell": r"rm -rf|\bcurl -|\bwget \b|pip install -q|/bin/(ba)?sh",
}
"""What its rules have fired on, in the text of any file: ComfyUI's registry-backend, issues 179 to 229."""


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def packed() -> list[str]:
    """`comfy node pack`'s files: those git tracks but for the patterns of .comfyignore, which are git's own."""
    left_out = set(_git("ls-files", "--cached", "--ignored", "--exclude-from", str(ROOT / ".comfyignore")))
    return [name for name in _git("ls-files") if name not in left_out and (ROOT / name).is_file()]


def test_the_zip_has_what_the_nodes_reach(packed):
    needed = {MODULES[name].relative_to(ROOT).as_posix() for name in shipped()}
    assert not needed - set(packed)
    for top in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"):
        assert top in packed


def test_the_zip_has_neither_tests_nor_the_command_line(packed):
    assert not [
        name for name in packed if re.match(r"tests/|docs/|\.|Makefile|anchor_core/(bench|commands|cli\.py)", name)
    ]


@pytest.mark.parametrize("what", FLAGGED)
def test_nothing_in_the_zip_is_flagged(packed, what):
    found = []
    for name in packed:
        if Path(name).suffix in TEXTS:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{n}: {line[:120]}" for n, line in enumerate(lines, 1) if re.search(FLAGGED[what], line)]
    assert not found


def test_the_zip_is_small(packed, tmp_path):
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in packed:
            file.write(ROOT / name, name)
    assert (tmp_path / "node.zip").stat().st_size < LIMIT_MB * 1e6


def test_what_the_registry_shows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    about, comfy = project["project"], project["tool"]["comfy"]
    # A list of accelerators marks every computer that has another as unfit.
    assert not [each for each in about["classifiers"] if each.startswith("Environment ::")]
    assert [each for each in about["classifiers"] if each.startswith("Operating System ::")]
    assert "comfyui" not in about["name"].lower() and re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    raw = about["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    for picture, shape in (("Icon", 1), ("Banner", 21 / 9)):
        assert comfy[picture].startswith(raw)
        with Image.open(ROOT / comfy[picture].removeprefix(raw)) as file:
            assert file.width / file.height == pytest.approx(shape) and file.format in ("PNG", "JPEG", "GIF")
            assert picture == "Banner" or file.width <= 400


def test_the_changelog_begins_with_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert sections[0] == version


def test_both_lists_of_requirements_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    # ComfyUI brings its own torch, and another one must not come over it.
    assert lines == [each for each in project["dependencies"] if not each.startswith("torch")]
