"""Cases of a script that prints a line for each, in processes that are ended where they hang."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10


def lines(process: subprocess.Popen) -> queue.Queue:
    """What it prints, as it comes, and None at its end."""
    found: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            found.put(line.strip())
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def run_cases(
    script: str, kind: str, cases: int, good: Collection[str], base: Path, start: float = 120
) -> tuple[Counter[str], list[str]]:
    """How many of the cases ended in each of the `good` ways, and the lines of the others.

    Args:
        script: run as `script FOLDER KIND FIRST LAST`; it prints `<seed> <outcome>` for each.
        start: seconds until the first line; for all others there are `SECONDS`.
    """
    told, wrong, seed = Counter(), [], 0
    while seed < cases:  # a process that hangs is ended, and the next goes on behind that seed
        folder = base / f"from {seed}"
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, script, folder, kind, str(seed), str(cases)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found, limit = lines(process), start
        try:
            while (line := found.get(timeout=limit)) is not None:
                limit = SECONDS
                number, outcome = line.split(" ", 1)
                assert int(number) == seed
                seed += 1
                told[outcome] += outcome in good
                if outcome not in good:
                    wrong.append(line)
        except queue.Empty:
            if seed < cases:  # else it is only slow to end
                wrong.append(f"{seed} took more than {limit} s")
            seed += 1
        else:
            if seed < cases:
                wrong.append(f"{seed} ended the process, {process.wait()}")
                seed += 1
        finally:
            process.kill()
            process.wait()
    said = ", ".join(f"{told[outcome]} {outcome}" for outcome in good)
    print(f"{kind}: {cases} cases, {said}, {len(wrong)} wrong")
    return told, wrong
