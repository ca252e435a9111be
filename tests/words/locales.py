"""Writes the names and tooltips of the nodes in every language, from the nodes of a running ComfyUI.

    python -m tests.words.locales [TRANSLATIONS]           (COMFYUI_PATH as for the tests)

English is what the nodes say. What a language has for an English text already is kept; what it lacks is taken from
TRANSLATIONS, a JSON file of {language: {English: translated}}, and otherwise left in English and listed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.comfyui import comfy_server

FOLDER = comfy_server.ROOT / "locales"
LANGUAGES = ("zh", "ja", "ko")
SYNTAX = re.compile(r"[@|]|\{[^}]|%\{")
"""What the front end's vue-i18n would read as its own; {} alone is safe."""


def english(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """nodeDefs.json of our nodes: display name, description, inputs and outputs, as the nodes declare them."""
    return {
        type_: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": dict(inputs(info["input"])),
            "outputs": {
                str(number): {"name": name, "tooltip": tooltip}
                for number, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"]))
            },
        }
        for type_, info in sorted(object_info.items())
        if type_.startswith("Anchor")
    }


def inputs(sections: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """(key, name and tooltip) of each input, and of those that a dynamic one opens."""
    for section in ("required", "optional"):
        for name, (kind, *options) in sections.get(section, {}).items():
            given = options[0] if options else {}
            yield f"{inside}{name}", {"name": given.get("display_name") or name, "tooltip": given.get("tooltip", "")}
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for option in given["options"]:
                    yield from inputs(option["inputs"], f"{inside}{name}_")  # the front end's key of `name.part`


def texts(defs: Any) -> Iterator[str]:
    """Every text, in order."""
    if isinstance(defs, str):
        yield defs
    else:
        for part in defs if isinstance(defs, list) else defs.values():
            yield from texts(part)


def translated(defs: Any, known: Mapping[str, str]) -> Any:
    """The same tree with the texts that `known` has."""
    if isinstance(defs, str):
        return known.get(defs, defs)
    return {name: translated(part, known) for name, part in defs.items()}


def read(language: str, name: str = "nodeDefs") -> dict[str, Any]:
    file = FOLDER / language / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def pairs(one: Any, other: Any) -> Iterator[tuple[str, str]]:
    """(English, translated) of two trees, where both have a text."""
    if isinstance(one, str):
        yield one, other
        return
    for name in one.keys() & other.keys():
        yield from pairs(one[name], other[name])


def write(object_info: Mapping[str, Any], more: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Writes all files; the English texts that a language has nothing for."""
    before, now = read("en"), english(object_info)
    missing = []
    for language in ("en", *LANGUAGES):
        known = {} if language == "en" else {**dict(pairs(before, read(language))), **more.get(language, {})}
        missing += [f"{language}: {text}" for text in dict.fromkeys(texts(now)) if known and text not in known]
        file = FOLDER / language / "nodeDefs.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps(translated(now, known), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
        )
    return missing


def main(*files: str) -> None:
    more = json.loads(Path(files[0]).read_text(encoding="utf-8")) if files else {}
    with tempfile.TemporaryDirectory() as base:
        comfy_server.install_pack(Path(base) / "custom_nodes" / comfy_server.PACK)
        server = comfy_server.ComfyServer(*comfy_server.find(), Path(base))
        try:
            print("\n".join(write(server.get("/object_info"), more)))
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
