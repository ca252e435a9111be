"""The words of the nodes: translations that are whole and in step with the nodes, and a help page for each."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.comfyui import comfy_server
from tests.nodes.test_nodes import NODES
from tests.words.locales import FOLDER, LANGUAGES, SYNTAX, english, inputs, read, texts

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

HELP = comfy_server.ROOT / "web/docs"
PAGES = sorted(HELP.glob("*.md"))
IDENTIFIER = re.compile(r"[a-z0-9_]+|LoRA\.|Semantic Anchor")
"""What may read the same in every language."""


def shape(defs: Any) -> Any:
    """The tree's keys without its texts."""
    if isinstance(defs, dict):
        return {name: shape(part) for name, part in defs.items()}
    return len(defs) if isinstance(defs, list) else None


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def test_english_is_what_the_nodes_say(object_info):
    """After a change of a node: python -m tests.words.locales."""
    assert read("en") == english(object_info)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["nodeDefs", "main"])
def test_every_text_is_there_and_none_is_stale(language, file):
    theirs, ours = read(language, file), read("en", file)
    assert shape(theirs) == shape(ours)
    left = [one for one, other in zip(texts(ours), texts(theirs)) if one == other and not IDENTIFIER.fullmatch(one)]
    assert not left and all(texts(theirs))


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_no_text_holds_what_the_front_end_would_read_as_its_own(language):
    assert not [text for file in ("nodeDefs", "main") for text in texts(read(language, file)) if SYNTAX.search(text)]


def test_a_part_of_a_dynamic_input_says_the_same_under_every_choice(object_info):
    """The front end has one name for `rule.start`, whatever the rule."""
    for type_, info in object_info.items():
        if type_.startswith("Anchor"):
            said = {}
            for name, about in inputs(info["input"]):
                assert said.setdefault(name, about) == about, f"{type_}.{name}"


def test_the_server_gives_the_languages(server):
    merged = server.get("/i18n")
    for language in ("en", *LANGUAGES):
        assert merged[language]["nodeDefs"]["AnchorTrainLoRA"] == read(language)["AnchorTrainLoRA"]
    assert {folder.name for folder in FOLDER.iterdir()} == {"en", *LANGUAGES}


def test_every_node_has_a_help_page_and_no_page_is_left(object_info):
    ours = {name for name in object_info if name.startswith("Anchor")}
    assert {page.stem for page in PAGES} == ours >= set(NODES)
    for page in PAGES:
        assert page.read_text(encoding="utf-8").startswith(f"# {object_info[page.stem]['display_name']}\n")


def test_the_pictures_of_the_pages_are_there_and_small():
    shown = {name for page in PAGES for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}
    kept = {file.name: file.stat().st_size for file in HELP.iterdir() if file.suffix not in (".md", "")}
    assert shown == set(kept)
    assert max(kept.values()) < 60_000 and sum(kept.values()) < 600_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_help_page_is_there_in_every_language(language):
    """With the node's name, the pictures, tables and lists of the English one."""
    names = read(language)
    for page in PAGES:
        english_page = page.read_text(encoding="utf-8")
        text = (HELP / page.stem / f"{language}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {names[page.stem]['display_name']}\n"), page.stem
        for part in (r"!\[[^\]]+\]\(([^)]+)\)", r"^(\|)", r"^(- )", r"^(#+) ", r"^(```)"):
            assert re.findall(part, text, re.M) == re.findall(part, english_page, re.M), (page.stem, part)
    assert {folder.name for folder in HELP.iterdir() if folder.is_dir()} == {page.stem for page in PAGES}
