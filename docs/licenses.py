"""Writes LICENSES.md beside it: the licence of each package that the project needs, as installed here."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
HEAD = """# Licences of what this project needs

Semantic Anchor itself is under the [Apache License 2.0](../LICENSE), and so is the embedded model, which was pretrained
from nothing on pictures that the project draws. `make licenses` writes this table of what `pip install` brings along on
Linux, from the packages' own metadata.

| package | licence | needed |
|---|---|---|
"""


def licence(name: str) -> str:
    """A package's SPDX expression, else its classifiers, else the first line of its licence field."""
    about = distribution(name).metadata
    classifiers = [c.split(" :: ")[-1] for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    return (
        about.get("License-Expression") or ", ".join(classifiers) or (about.get("License") or "not said").split("\n")[0]
    )


def needed(names: list[str], why: str) -> dict[str, str]:
    """Each package to why, with those that it needs in turn; extras and other systems' are left out."""
    found: dict[str, str] = {}
    while names:
        name = canonicalize_name(names.pop())
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found[name] = why
            wanted = (Requirement(text) for text in requirements)
            names += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found: dict[str, str] = {}
    for why, wanted in (("always", project["dependencies"]), *((f"extra {name}", extras[name]) for name in extras)):
        found = needed([Requirement(text).name for text in wanted], why) | found
    rows = [f"| {name} | {licence(name)} | {found[name]} |" for name in sorted(found)]
    (HERE / "LICENSES.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
