"""What becomes of the processes of a benchmark when it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from anchor_core.bench import runner

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    devices = context.Queue()
    devices.put("cpu")
    with ProcessPoolExecutor(1, context, initializer=runner._begin, initargs=(devices,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a process by a signal")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path, method):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(method=method), encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(worker, 9)
    pytest.fail("it goes on without its parent")
