"""What a training is told while it goes on, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

POLL = 0.1
"""Seconds between two looks at `cancelled` while the training is paused."""

PICTURE, SAVE = "picture", "save"


class Orders:
    """Orders to one training. Each is answered before the next step; during a pause, at once.

    An order that comes while pictures are prepared waits for the next gap there, or for the first step; none is lost.
    `cancel` outranks `stop`, and both outrank `pause`.

    Args:
        cancelled: asked at every gap, for a host that has a flag of its own; True is as good as `cancel()`.
    """

    def __init__(self, cancelled: Callable[[], bool] | None = None):
        self._flag = cancelled
        self._changed = threading.Condition()
        self._ending: str | None = None
        self._paused = False
        self._wanted: list[str] = []

    # --- given by the user ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End after this step, and go on with what has been learnt."""
        with self._changed:
            self._ending = self._ending or "stopped"
            self._changed.notify_all()

    def cancel(self) -> None:
        """End after this step as a failure of the whole job; what has been learnt is in the file."""
        self._set(_ending="cancelled")

    def pause(self) -> None:
        """Wait after this step, with everything in memory, until `go_on`."""
        self._set(_paused=True)

    def go_on(self) -> None:
        """End the pause."""
        self._set(_paused=False)

    def picture_now(self) -> None:
        """Sample the subject prompt after this step; once for each time that this is said."""
        self._want(PICTURE)

    def save_now(self) -> None:
        """Write the adapter as it is after this step into a file of its own."""
        self._want(SAVE)

    # --- read by the training ---------------------------------------------------------------------------------------

    @property
    def ending(self) -> str | None:
        """`stopped` or `cancelled` if the training is to end."""
        if self._flag is not None and self._flag():
            self.cancel()
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

    def _set(self, **state) -> None:
        with self._changed:
            vars(self).update(state)
            self._changed.notify_all()

    def _want(self, what: str) -> None:
        with self._changed:
            self._wanted.append(what)
            self._changed.notify_all()
