"""Checks of the anchor bank."""

from __future__ import annotations

import tempfile

import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.denoiser import Denoiser
from anchor_core.training.bank import Bank
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

from .steps import CONCEPT, LAYERS, Shape, draw


def check_bank_changes_no_bit(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """A training takes the same steps with a bank, empty or full, as without one; with new draws and with fixed."""
    latents = draw(denoiser, shape, 2, seed=5)

    def trained(bank, draws):
        adapter = denoiser.attach(AdapterConfig(rank=2, layers=layers), seed=1)
        try:
            settings = TrainSettings(steps=2, batch_size=2, learning_rate=1e-2, draws=draws, memory="off")
            return train(denoiser, adapter, latents, CONCEPT, settings, bank=bank).losses, adapter.state_dict()
        finally:
            denoiser.detach()

    for draws in (0, 2):
        losses, state = trained(None, draws)
        with tempfile.TemporaryDirectory() as folder:
            for full in (False, True):
                bank = Bank(denoiser, folder)
                again, own = trained(bank, draws)
                assert again == losses, f"with draws {draws} the losses are {losses}, and {again} with a bank"
                assert all(torch.equal(state[key], own[key]) for key in state), "the bank changes the adapter"
                assert (bank.computed == 0) == full, f"a bank with draws {draws} computes {bank.computed} passes"
