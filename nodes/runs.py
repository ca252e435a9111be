"""The trainings of this ComfyUI: those that go on, by id, and what the others left on disk."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths

EVENT = "semantic_anchor.run"
"""Of ComfyUI's socket: where a training is, without its curves, for all windows; they ask a route for the rest."""

LISTED = 50
"""The most runs of a list."""

_CURVES = ("losses", "probes", "distances", "pictures", "saved", "made_with")  # what only a whole record has
_ENDED_BEFORE = "ComfyUI ended before the training did"


@dataclass
class Run:
    """A training that goes on.

    Attributes:
        orders, record: `anchor_core.training`'s.
        folder: of the record.
        listeners: of its events, the record's first.
    """

    id: str
    orders: Any
    folder: Path
    record: Any = None
    listeners: list[Callable] = field(default_factory=list)

    def tell(self, event) -> None:
        for listener in (self.record, *self.listeners):
            listener(event)


_lock = threading.Lock()
_live: dict[str, Run] = {}
_unwritten: dict[str, dict[str, Any]] = {}  # last states of those that ended before their first step
_headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # of records on disk: time of change, the state without curves


@contextmanager
def begin(
    adapter: Path, settings, orders, workflow: str | None, checkpoints: str | None, chosen: Mapping[str, Any]
) -> Iterator[Run]:
    """Register a training under a new id until it ends, however it does; its record lies beside `adapter`.

    Args:
        workflow: the id of the graph that was queued, where there is one.
        checkpoints: what a training that goes on from this one chooses as `resume`.
        chosen: what the preset decided.
    """
    from comfy_execution.utils import get_executing_context

    from ..anchor_core.training.events import Ended
    from ..anchor_core.training.record import Record, record_folder

    here = get_executing_context()
    place = {"prompt": here and here.prompt_id, "node": here and here.node_id, "workflow": workflow}
    run = Run(uuid.uuid4().hex, orders, record_folder(adapter))
    about = {"id": run.id, **place, "file": adapter.name, "checkpoints": checkpoints, "seed": settings.seed}
    about |= {"preset": settings.preset, "chosen": dict(chosen)}
    run.record = Record(run.folder, about, settings, memory=_memory, changed=_send)
    with _lock:
        _live[run.id] = run
    try:
        yield run
    except BaseException as error:
        ended = run.record.state
        if isinstance(error, comfy.model_management.InterruptProcessingException):
            # What the training itself cannot know: ComfyUI's progress bar and samplers raise it too.
            run.record(Ended("cancelled", ended["step"], ended["step"]))
        elif ended["how"] in (None, "finished", "stopped", "over_budget"):  # it failed outside the loop
            run.record(Ended("failed", ended["kept"] or 0, ended["step"], " ".join(str(error).split())))
        raise
    finally:
        with _lock:
            del _live[run.id]
            if not run.record.begun:
                _unwritten[run.id] = run.record.state
                for old in list(_unwritten)[:-LISTED]:
                    del _unwritten[old]


def live(id: str) -> Run | None:
    with _lock:
        return _live.get(id)


def state(id: str) -> dict[str, Any] | None:
    """The whole record of a run; None if there is none of that id."""
    from ..anchor_core.training.record import read_record

    with _lock:
        if id in _live or id in _unwritten:
            return _live[id].record.state if id in _live else _unwritten[id]
    file = _file(id)
    read = None if file is None else read_record(file)
    return None if read is None else _as_left(read)


def picture(id: str, step: int) -> Path | None:
    """The file of a run's sample picture after `step` steps."""
    run, told = live(id), state(id)
    if told is None or step not in [each["step"] for each in told["pictures"]]:
        return None
    folder = run.folder if run is not None else getattr(_file(id), "parent", None)
    file = folder and folder / f"step-{step:06}.jpg"
    return file if file and file.is_file() else None


def listed(node: str | None = None, workflow: str | None = None) -> list[dict[str, Any]]:
    """The runs of a node or of a workflow, or all, the newest first, without their curves."""
    with _lock:
        known = {id: _header(run.record.state) for id, run in _live.items()}
        known |= {id: _header(each) for id, each in _unwritten.items()}
    for header in _scan().values():
        known.setdefault(header["id"], _as_left(header))
    wanted = {"node": node, "workflow": workflow}
    chosen = [each for each in known.values() if all(v is None or each[key] == v for key, v in wanted.items())]
    return sorted(chosen, key=lambda each: each["begun"], reverse=True)[:LISTED]


def _header(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in _CURVES}


def _as_left(state: dict[str, Any]) -> dict[str, Any]:
    """A record on disk of a run that does not go on: if it has no end, ComfyUI had one before."""
    return state if state["how"] is not None else {**state, "phase": "ended", "how": "failed", "reason": _ENDED_BEFORE}


def _file(id: str) -> Path | None:
    return next((file for file, header in _scan().items() if header["id"] == id), None)


def _scan() -> dict[Path, dict[str, Any]]:
    """The records beside the files of the training node; only those that changed are read."""
    from ..anchor_core.training.record import FILE, read_record

    roots = [Path(folder_paths.get_output_directory()) / "loras", Path(folder_paths.get_folder_paths("embeddings")[0])]
    files = {file: file.stat().st_mtime_ns for root in roots for file in root.rglob(f"*.run/{FILE}")}
    with _lock:
        for file in [file for file in _headers if file not in files]:
            del _headers[file]
        for file, changed in files.items():
            if _headers.get(file, (None,))[0] != changed:
                _headers[file] = changed, _header(read_record(file) or {})
        return {file: header for file, (_, header) in _headers.items() if {"id", "begun", "how"} <= header.keys()}


def _memory() -> dict[str, int]:
    """Bytes of the device: used, by whomever, and in all."""
    total = comfy.model_management.get_total_memory()
    return {"used": int(total - comfy.model_management.get_free_memory()), "total": int(total)}


def _send(state: dict[str, Any]) -> None:
    """To all windows where the training is, and to that which queued it a line that needs no JavaScript of ours."""
    from server import PromptServer

    from ..anchor_core.training.record import line

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        if state["node"] is not None:
            server.send_progress_text(line(state), state["node"], server.client_id)
        server.send_sync(EVENT, _header(state))  # after the line, which a page with our script hides
