"""What a training is told while it goes on, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..checks import check_count
from .events import PhaseBegun, Tell

POLL = 0.1
"""Seconds between two looks at `cancelled` while the training is paused."""

PICTURE, SAVE = "picture", "save"


class Orders:
    """Orders to one training. Each is answered before the next step; during a pause, at once.

    An order that comes while pictures are prepared waits for the next gap there, or for the first step; none is lost.
    `cancel` outranks `stop` and `keep`, and all three outrank `pause`. Once no step is made any more each order raises
    a ValueError that says so.

    Args:
        cancelled: asked at every gap, for a host that has a flag of its own; True is as good as `cancel()`.
    """

    def __init__(self, cancelled: Callable[[], bool] | None = None):
        self._flag = cancelled
        self._changed = threading.Condition()
        self._ending: str | None = None
        self._paused = False
        self._wanted: list[str] = []
        self._saved: set[int] = set()
        self._kept: int | None = None
        self._more, self._fixed, self._over = 0, "", False

    # --- given by the user ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End after this step, and go on with what has been learnt."""
        with self._given():
            self._ending = self._ending or "stopped"

    def keep(self, step: int) -> None:
        """End as `stop` does, with the weights that were saved after `step` steps as the result.

        Raises:
            ValueError: if none were saved then.
        """
        with self._given():
            if check_count("step", step) not in self._saved:
                those = f"take one of {sorted(self._saved)}" if self._saved else "save now, and keep that step"
                raise ValueError(f"step is {step!r}, whose weights were not saved; {those}")
            self._kept, self._ending = step, self._ending or "stopped"

    def extend(self, steps: int) -> None:
        """Make `steps` more steps than planned.

        Raises:
            ValueError: for a number below 1, or if the learning rate has a course that ends with the planned steps.
        """
        with self._given():
            if self._fixed:
                raise ValueError(self._fixed)
            self._more += check_count("steps", steps)

    def cancel(self) -> None:
        """End after this step as a failure of the whole job; what has been learnt is in the file."""
        with self._given():
            self._ending = "cancelled"

    def pause(self) -> None:
        """Wait after this step, with everything in memory, until `go_on`."""
        with self._given():
            self._paused = True

    def go_on(self) -> None:
        """End the pause."""
        with self._given():
            self._paused = False

    def picture_now(self) -> None:
        """Sample the subject prompt after this step; once for each time that this is said."""
        with self._given():
            self._wanted.append(PICTURE)

    def save_now(self) -> None:
        """Write the adapter as it is after this step into a file of its own."""
        with self._given():
            self._wanted.append(SAVE)

    # --- read by the training ---------------------------------------------------------------------------------------

    @property
    def ending(self) -> str | None:
        """`stopped` or `cancelled` if the training is to end."""
        if self._flag is not None and self._flag():
            self._ending = "cancelled"
        return self._ending

    @property
    def paused(self) -> bool:
        return self._paused and self.ending is None

    def take(self) -> list[str]:
        """The pictures (`PICTURE`) and files (`SAVE`) that were asked for since, in order."""
        with self._changed:
            wanted, self._wanted = self._wanted, []
        return wanted

    def wait(self) -> None:
        """Until something may have changed."""
        with self._changed:
            if self._paused and not self._wanted and self._ending is None:
                self._changed.wait(POLL)

    def gap(self, tell: Tell, phase: str) -> Iterator[None]:
        """Once, and while it is paused again at each change; a pause is told, and the phase that goes on after it."""
        yield
        if not self.paused:
            return
        tell(PhaseBegun("paused"))
        while True:
            self.wait()
            yield
            if not self.paused:
                break
        tell(PhaseBegun(phase))

    @property
    def kept(self) -> int | None:
        """The step that `keep` asked for, unless the training was cancelled."""
        return None if self.ending == "cancelled" else self._kept

    @property
    def more(self) -> int:
        """Steps beyond the planned ones."""
        return self._more

    def goes_on(self, made: int, planned: int) -> bool:
        """Whether a step follows the `made` ones; after False no order is taken any more."""
        with self._changed:
            self._over = self._over or made >= planned + self._more
            return not self._over

    def close(self) -> None:
        """Take no order any more."""
        with self._changed:
            self._over = True

    def fix_steps(self, why: str) -> None:
        """Refuse `extend` with this sentence."""
        self._fixed = why

    def saved(self, step: int) -> None:
        """The weights after `step` steps can be kept."""
        with self._changed:
            self._saved.add(step)

    @contextmanager
    def _given(self) -> Iterator[None]:
        with self._changed:
            if self._over:
                raise ValueError("the training makes no more steps, so that it takes no orders; run it again")
            yield
            self._changed.notify_all()
