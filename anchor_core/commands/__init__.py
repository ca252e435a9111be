"""What the verbs of the command line do, each given its parsed options."""

from .checking import selftest
from .files import convert
from .measuring import compare, inspect
from .sampling import adjust, sample
from .sandbox import bench, demo, pretrain, subject, subjects
from .speed import speed
from .training import train

__all__ = [
    "adjust", "bench", "compare", "convert", "demo", "inspect", "pretrain", "sample", "selftest", "speed", "subject",
    "subjects", "train",
]  # fmt: skip
