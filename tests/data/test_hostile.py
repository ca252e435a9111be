"""Damaged pictures, masks, captions and names by the hundred: each is read, or refused in one sentence, in time."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.data import hostile

SECONDS = 10
CASES = {"pictures": 450, "exif": 300, "masks": 150, "captions": 200, "names": 100}


def lines(process: subprocess.Popen) -> queue.Queue:
    """What it prints, as it comes, and None at its end."""
    found: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            found.put(line.strip())
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


@pytest.mark.long
@pytest.mark.parametrize("kind", CASES)
def test_hostile(tmp_path, kind, record_property):
    root = Path(hostile.__file__).resolve().parents[2]
    told, wrong, seed = Counter(), [], 0
    while seed < CASES[kind]:  # a process that hangs is ended, and the next goes on behind that seed
        base = tmp_path / f"from {seed}"
        base.mkdir()
        process = subprocess.Popen(
            [sys.executable, hostile.__file__, base, kind, str(seed), str(CASES[kind])],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=base,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found, limit = lines(process), 120  # for the imports
        try:
            while (line := found.get(timeout=limit)) is not None:
                limit = SECONDS
                number, outcome = line.split(" ", 1)
                assert int(number) == seed
                seed += 1
                told[outcome] += outcome in ("read", "refused")
                if outcome not in ("read", "refused"):
                    wrong.append(line)
        except queue.Empty:
            wrong.append(f"{seed} took more than {limit} s")
            seed += 1
        else:
            if seed < CASES[kind]:
                wrong.append(f"{seed} ended the process, {process.wait()}")
                seed += 1
        finally:
            process.kill()
            process.wait()
    print(f"{kind}: {CASES[kind]} cases, {told['read']} read, {told['refused']} refused, {len(wrong)} wrong")
    assert not wrong
    assert told["read"] == CASES[kind] if kind == "exif" else told["read"] and told["refused"]


def test_the_hook_sees_a_write(tmp_path):
    """In a process of its own, as hooks stay."""
    code = f"from tests.data.hostile import watch\ndone = watch()\nopen({str(tmp_path / 'a')!r}, 'w')\nprint(done())"
    root = Path(hostile.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.startswith("[\"open '") and str(tmp_path) in done.stdout
