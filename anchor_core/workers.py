"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this worker as soon as the process that started it is gone; the initializer of a process pool.

    A worker whose parent was killed is told nothing: it goes through the jobs that are queued, keeps its memory and its
    GPU, and then waits for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)  # sys.exit would end this thread alone, in the middle of a job
