"""What every training of the embedded model's benchmarks, and of the demo, starts from."""

from __future__ import annotations

from ..adapters.config import AdapterConfig
from ..training.settings import TrainSettings

TUNING_SUBJECTS = ("rosie", "ziggy")
"""The settings below were chosen on these two; the tables leave them out."""
TABLE_SUBJECTS = ("pip", "momo", "bolt", "luna", "dot", "tri", "loop", "plus")

SETTINGS = TrainSettings(steps=100, learning_rate=5e-4, token_learning_rate=3e-2, batch_size=4, probe_every=25)
ADAPTER = AdapterConfig(rank=8, layers="all_linear_conv", vectors=1)
CLASS_PICTURES = 24
SAMPLING = {"steps": 10, "guidance": 4.0}
