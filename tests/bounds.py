"""`make test-lowest`, `make test-newest`: the fast suite in an environment of its own, at an end of what is allowed.

    python -m tests.bounds lowest|newest ENVIRONMENT [FILE OR FOLDER ...]

The lowest are the versions behind `>=` in pyproject.toml, the newest what an index has; torch stays the one that the
Makefile pins. What was run passes file by file, so that it can be broken off; ComfyUI is left out, as it has its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(end: str) -> list[str]:
    """What to install, of everything that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    (torch,) = [each for each in named if each.startswith("torch==")]
    rest = [each for each in dict.fromkeys(named) if not each.startswith("torch")]
    return [torch, *(re.sub(">=", "==", each) if end == "lowest" else each for each in rest)]


def install(end: str, environment: Path) -> Path:
    """Its interpreter."""
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    torch, *rest = requirements(end)
    upgraded = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    subprocess.run([python, "-m", "pip", "install", "--quiet", torch], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *upgraded, torch, *rest], check=True)
    return python


def main(end: str, environment: str, *places: str) -> int:
    python = install(end, Path(environment).resolve())
    told = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    print(told)
    hidden = {**os.environ, "COMFYUI_PATH": str(ROOT / "tests")}  # which holds none
    failed = []
    for folder in places or sorted(
        {str(file.parent.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")}
    ):
        files = [folder] if folder != "tests" else sorted(map(str, (ROOT / "tests").glob("test_*.py")))
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        print(f"{end}, {folder}:", flush=True)
        if subprocess.run([str(each) for each in command], cwd=ROOT, env=hidden).returncode not in (0, 5):
            failed.append(folder)
    print(f"{end}: {f'failed in {failed}' if failed else 'passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("lowest", "newest"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
