"""The record of a training: what its events told, thinned to what a page can show, in one small file beside the LoRA.

`run.json` and the sample pictures lie in a folder `<name of the LoRA>.run`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.pictures import as_picture
from ..writing import whole
from .events import Event, Measured
from .keeping import Candidates
from .settings import TrainSettings

logger = logging.getLogger(__name__)

FILE = "run.json"
POINTS = 300
"""The most points of a curve; between half of them and all are used."""

PUBLISHED, WRITTEN = 0.5, 2.0
"""Seconds between two states of a record that are told, and two that are written, where nothing but a step happened."""

SIDE = 512
"""Of the sample pictures, in pixels."""

_RECENT = 20  # steps that the time of a step is the mean of


class Curve:
    """Values over steps: of however many, at most `POINTS` means of as many neighbours each."""

    def __init__(self):
        self.every = 1
        self._points: list[tuple[int, int, dict[str, float]]] = []  # values in it, its last step, their sums

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._points and self._points[-1][0] < self.every:
            self._points[-1] = _joined(self._points[-1], (1, step, dict(values)))
            return
        if len(self._points) == POINTS:
            self._points = [_joined(*self._points[i : i + 2]) for i in range(0, POINTS, 2)]
            self.every *= 2
        self._points.append((1, step, dict(values)))

    def to_dict(self) -> dict[str, Any]:
        """`every`, how many values a point is the mean of; `step`, the last of each; `values`, a list by name."""
        names = dict.fromkeys(name for _, _, sums in self._points for name in sums)
        values = {name: [_number(sums.get(name, math.nan) / n) for n, _, sums in self._points] for name in names}
        return {"every": self.every, "step": [step for _, step, _ in self._points], "values": values}


def _joined(one, other):
    return one[0] + other[0], other[1], {name: value + other[2].get(name, math.nan) for name, value in one[2].items()}


class Record:
    """A listener that keeps the record of one training.

    Args:
        folder: of `run.json` and the pictures. Nothing is written before there is a step or a picture.
        about: of the training: JSON values that are in the record from the start, beside `begun` in ms since 1970.
        settings: for the planned steps, and for which measured step is the best.
        memory: gives what is shown as memory, a JSON value.
        changed: is told each new state, but not the first.

    Attributes:
        begun: whether there is something on disk.
        state: the newest; it is replaced, never changed, so that other threads may read it.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        settings: TrainSettings,
        *,
        memory: Callable[[], Any] = lambda: None,
        changed: Callable[[dict[str, Any]], None] = lambda state: None,
    ):
        self._folder, self._memory, self._changed = folder, memory, changed
        self._w, self._limit = settings.keep_w, settings.stop_on_drift
        self._losses, self._probes, self._distances, self._best = Curve(), Curve(), Curve(), Candidates("best")
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT + 1)
        self._published = self._written = -math.inf
        self.begun = self._warned = False
        self._now: dict[str, Any] = {
            **about, "begun": round(1000 * time.time()), "phase": "preparing", "how": None, "reason": "", "step": 0,
            "steps": settings.steps, "fixed_length": settings.fixed_length, "seconds": 0.0, "seconds_per_step": None,
            "drift": None, "best": None, "kept": None, "saved": [], "pictures": [],
        }  # fmt: skip
        self.state = self._newest()

    def __call__(self, event: Event) -> None:
        getattr(self, f"_{event.event}")(event)
        now, quiet = time.monotonic(), event.event in ("step", "measured")
        if not quiet or now - self._published >= PUBLISHED:
            self._publish()
        if self.begun and (not quiet or now - self._written >= WRITTEN):
            self._write()

    # --- the events -------------------------------------------------------------------------------------------------

    def _phase(self, event) -> None:
        self._now["phase"] = event.phase

    def _fitted(self, event) -> None:
        self._now["chosen"] = {**self._now.get("chosen", {}), **event.settings}

    def _resumed(self, event) -> None:
        history = event.history
        for i in range(event.step):
            self._losses.add(i + 1, {name: values[i] for name, values in history.terms.items()})
            self._distances.add(i + 1, {name: values[i] for name, values in history.distances.items() if values[i:]})
        for step, result in history.probes:
            self._measured(Measured(step, result))
        self._now |= {"step": event.step, "seconds": history.seconds}

    def _step(self, event) -> None:
        self._begin()
        self._losses.add(event.step, event.terms)
        self._distances.add(event.step, event.distances)
        self._recent.append((event.step, event.seconds))
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        each = (now - began) / (last - first) if last > first else event.seconds / event.step
        self._now |= {"step": event.step, "steps": event.steps, "seconds": event.seconds, "seconds_per_step": each}

    def _measured(self, event) -> None:
        result, step = event.result, event.step
        values = {name: getattr(result, name) for name in ("drift", "reconstruction", "class_drift")}
        self._probes.add(step, values)
        if not 0 < self._limit < result.drift:
            self._best.offer(step, result.objective(self._w), dict)
        best = self._best.kept
        self._now |= {"drift": result.drift, "best": best and best["step"] or None}

    def _picture(self, event) -> None:
        self._begin()
        name = f"step-{event.step:06}.jpg"
        try:
            thumbnail(event.pixels).save(self._folder / name, quality=88)
        except OSError as error:
            return self._warn(error)
        made = [each for each in self._now["pictures"] if each["step"] != event.step]
        self._now["pictures"] = [*made, {"step": event.step, "file": name, "prompt": event.prompt}]

    def _saved(self, event) -> None:
        if self._now["phase"] == "saving":  # the name that was planned may have been taken meanwhile
            self._now["file"] = event.files[0].name
        if event.step not in [each["step"] for each in self._now["saved"]]:
            saved = {"step": event.step, "file": event.files[0].name}
            self._now["saved"] = [*self._now["saved"], saved]

    def _described(self, event) -> None:
        self._now["made_with"] = event.provenance

    def _ended(self, event) -> None:
        self._now |= {"phase": "ended", "how": event.how, "reason": event.reason, "kept": event.kept}

    # --- where it goes ----------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        self._published = time.monotonic()
        self.state = self._newest()
        self._changed(self.state)

    def _newest(self) -> dict[str, Any]:
        plain = {name: _number(value) if isinstance(value, float) else value for name, value in self._now.items()}
        kept = {"losses": self._losses, "probes": self._probes, "distances": self._distances}
        curves = {name: curve.to_dict() for name, curve in kept.items()}
        return {**plain, "memory": self._memory(), **curves}

    def _begin(self) -> None:
        """Make the folder, and clear what a training that left no LoRA of this name has left in it."""
        if self.begun:
            return
        self.begun = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in (self._folder / FILE, *self._folder.glob("step-*.jpg")):
                old.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _write(self) -> None:
        self._written = time.monotonic()
        try:
            with whole(self._folder / FILE) as part:
                part.write_text(json.dumps(self.state, allow_nan=False), encoding="utf-8")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        """The training matters more than its record."""
        if not self._warned:
            logger.warning("the record in %s cannot be written (%s); the training goes on", self._folder, error)
        self._warned = True


def record_folder(adapter: Path) -> Path:
    """Where the record of the training of this file lies."""
    return adapter.with_suffix(".run")


def read_record(file: Path) -> dict[str, Any] | None:
    """The last state of a `run.json`; None if it cannot be read."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def thumbnail(pixels: Tensor, side: int = SIDE) -> Image.Image:
    """A picture of (3, H, W) within `side`; small ones larger by whole factors, so that their pixels stay square."""
    picture = Image.fromarray(as_picture(pixels))
    scale = side // max(picture.size)
    if scale:
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def line(state: Mapping[str, Any]) -> str:
    """The state in one line, for who sees no page."""
    if state["phase"] not in ("training", "paused"):
        return state["phase"].replace("_", " ") if state["how"] is None else f"{state['how']} at step {state['step']}"
    parts = [f"step {state['step']} of {state['steps']}", *(["paused"] if state["phase"] == "paused" else [])]
    if state["seconds_per_step"]:
        left = round(state["seconds_per_step"] * (state["steps"] - state["step"]))
        parts += [f"{state['seconds_per_step']:.2f} s a step", f"{left // 60} min {left % 60} s left"]
    if state["drift"] is not None:
        parts.append(f"drift {state['drift']:.3g}")
    return ", ".join(parts)


def _number(value: float) -> float | None:
    """To six digits; None for NaN and infinity, which JSON has not."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
