"""What the verbs of the command line do, each given its parsed options.

OpenMP reads how its threads wait when torch loads. By default one that waits for the others of its process spins for
long, and takes the core from those whom another process's threads wait for in turn. So it spins briefly and then
sleeps, unless the user says otherwise (docs/SPEED.md has the figures).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .benching import bench_report, bench_run
from .checking import selftest
from .checkup import checkup
from .files import convert
from .measuring import compare, inspect
from .repeating import with_report
from .sampling import adjust, sample
from .sandbox import demo, pretrain, subject, subjects
from .speed import add_speed_options, speed
from .sweeping import sweep
from .training import train

__all__ = [
    "add_speed_options", "adjust", "bench_report", "bench_run", "checkup", "compare", "convert", "demo",
    "inspect", "pretrain", "sample", "selftest", "speed", "subject", "subjects", "sweep", "train", "with_report",
]  # fmt: skip
