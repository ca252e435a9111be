"""The house: which room may import which, what the registry's zip must not hold, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 400

ROOMS = ("", "adapters", "data", "backends", "sandbox", "training", "evaluation", "bench", "commands", "nodes")
"""Folders of `anchor_core` ("" for the method's own files) and `nodes`."""

MAY_IMPORT = {
    "": {""},
    "adapters": {"", "adapters"},
    "data": {"", "data"},
    "backends": {"", "adapters", "backends"},
    "training": {"", "adapters", "data", "training"},
    "sandbox": {"", "data", "backends", "sandbox"},
    "evaluation": {"", "adapters", "data", "training", "sandbox", "evaluation"},
    "bench": set(ROOMS) - {"commands", "nodes"},
    "commands": set(ROOMS) - {"nodes"},
    "nodes": set(ROOMS) - {"bench", "commands"},
}
"""Downwards only: nodes and commands, bench, evaluation and training, backends, adapters and data, the method."""

NOT_SHIPPED = {"subprocess", "pickle", "socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib"}
"""Modules that the registry's scanner holds a version back for (processes, code from files, the network)."""


def modules() -> dict[str, Path]:
    """Every Python file that is shipped, by its dotted name."""
    found = {}
    for top in ("anchor_core", "nodes"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Dotted names of what a module imports, of the project's and of others, inside functions too."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES else source


def room(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "nodes":
        return "nodes"
    return "" if len(parts) < 2 or parts[1] not in ROOMS else parts[1]


ARROWS = {name: {other for other in imported(name) if other in MODULES and other != name} for name in MODULES}


def test_no_circle():
    try:
        list(TopologicalSorter(ARROWS).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_arrows_run_downwards():
    # `cli` is the one file of the method's folder that stands above the commands.
    wrong = [
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        for other in sorted(others)
        if room(other) not in MAY_IMPORT[room(name)] and name != "anchor_core.cli"
    ]
    assert not wrong


def test_a_backend_knows_only_its_own_library():
    """One backend does not import the other, and what is neither backend nor worker of the bench imports no comfy."""
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported(name)
        if name.startswith("anchor_core.")
        and other.split(".")[0] in ("comfy", "folder_paths", "comfy_api")
        and not name.startswith(("anchor_core.backends.comfyui", "anchor_core.sandbox.comfyui", "anchor_core.bench."))
    ]
    for one, other in (("comfyui", "diffusers"), ("diffusers", "comfyui")):
        wrong += [
            f"{name} imports {target}"
            for name, targets in ARROWS.items()
            for target in targets
            if name.startswith(f"anchor_core.backends.{one}") and target.startswith(f"anchor_core.backends.{other}")
        ]
    assert not wrong


def shipped() -> set[str]:
    """What the nodes reach."""
    reached, open_ = set(), [name for name in MODULES if room(name) == "nodes"]
    while open_:
        name = open_.pop()
        if name not in reached:
            reached.add(name)
            open_ += ARROWS[name]
    return reached


def test_the_nodes_reach_no_command_line():
    assert not {name for name in shipped() if room(name) in ("bench", "commands") or name == "anchor_core.cli"}


def test_nothing_that_ships_would_hold_a_version_back():
    wrong = []
    for name in sorted(shipped()):
        wrong += [f"{name} imports {other}" for other in imported(name) if other.split(".")[0] in NOT_SHIPPED]
        for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.system"):
                wrong.append(f"{name} uses {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "os.popen"):
                wrong.append(f"{name} calls {ast.unparse(node.func)}")
    assert not wrong


def test_the_nodes_leave_the_threads_to_comfyui():
    calls = ("set_num_threads(", "set_num_interop_threads(", "OMP_")
    assert not [(name, call) for name in shipped() for call in calls if call in MODULES[name].read_text("utf-8")]


def test_no_file_is_long():
    files = [
        path
        for top in ("__init__.py", "anchor_core", "nodes", "web", "tests")
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
        if path.suffix in (".py", ".js", ".mjs") and path.is_file()
    ]
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > LIMIT}


@pytest.mark.parametrize(
    "above, below", list(pairwise(("commands", "bench", "evaluation", "training", "adapters", "")))
)
def test_the_map_of_rooms_has_no_circle_itself(above, below):
    assert above not in MAY_IMPORT[below]
