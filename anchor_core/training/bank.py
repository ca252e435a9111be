"""The anchor bank: what the pretrained network predicts does not change while an adapter is trained.

A prediction is known by all that it was made of: latents, noise, timesteps and class conditions of every row of its
pass, and the network. Rows are not told apart from the pass that they were in, as their last bits depend on it. So
what the bank gives is equal in every bit to what the pass would have computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import Cache, packed
from ..data.digest import digest
from ..denoiser import Condition, Denoiser, Step

logger = logging.getLogger(__name__)

GB = 1e9
_SIDE = 32
"""Of the latents, at most, by which a network is told from others."""
_LEVELS = (0.05, 0.35, 0.65, 0.95)


class Bank:
    """Anchors of one denoiser, in memory and, where a folder is given, on disk for later trainings.

    They are kept in 16 bits where that is every bit of them, as of a network that computes in 16 bits, else in 32.
    Once `limit` is reached no more are kept: a training that is made again begins with the first ones. A file that
    is damaged or of another shape is said to be, and what it held is computed again.

    Args:
        folder: made if it does not exist; other caches may be there too.
        limit: bytes, in memory and in the folder each.

    Attributes:
        computed, found: passes that were computed, and that were known.

    Raises:
        ValueError: if the folder cannot be written; later that is a warning.
    """

    def __init__(self, denoiser: Denoiser, folder: str | Path | None = None, limit: float = GB):
        self.denoiser, self.limit = denoiser, limit
        self.computed = self.found = 0
        self._files = None if folder is None else Cache(denoiser, folder)
        self._on_disk = 0 if folder is None else sum(file.stat().st_size for file in Path(folder).glob("anchors-*"))
        self._held: dict[str, Tensor] = {}
        self._bytes, self._told = 0, False
        self._names: dict[int, tuple[Condition, str | None]] = {}
        self._networks: dict[Any, str] = {}

    def anchors(
        self, conditions: Sequence[Condition], drawn: Sequence[Tensor], compute: Callable[[], Tensor]
    ) -> Tensor:
        """What `compute` gives, (B, C, h, w) in float32 on the denoiser's device, computed if it is not known.

        Args:
            conditions: of the class, one a row.
            drawn: latents and noise (B, C, h, w) and timesteps (B,), on the CPU.
        """
        device = self.denoiser.device
        names = [self._name(condition) for condition in conditions]
        autocast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"
        name = digest(autocast, *(own or f"object {id(each)}" for own, each in zip(names, conditions)), *drawn)
        if name in self._held:
            self.found += 1
            return self._held[name].to(device, torch.float32)
        file = None
        if self._files is not None and None not in names:
            network = self._network(conditions[0], drawn[0].shape[1:], autocast)
            file = f"anchors-{digest(network, name)}.safetensors"
            stored = self._read(file, drawn[0].shape)
            if stored is not None:
                self.found += 1
                self._hold(name, stored)
                return stored.to(device, torch.float32)
        self.computed += 1
        made = compute()
        kept = _exactly(made.detach().cpu())
        if bool(torch.isfinite(kept).all()):
            self._hold(name, kept)
            if file is not None:
                self._write(file, kept)
        return made

    def _hold(self, name: str, anchors: Tensor) -> None:
        if self._has_room(self._bytes, anchors, "memory"):
            self._bytes += anchors.nbytes
            self._held[name] = anchors

    def _has_room(self, held: int, anchors: Tensor, place: str) -> bool:
        fits = held + anchors.nbytes <= self.limit
        if not fits and not self._told:
            self._told = True
            logger.warning("the anchor bank holds %.2f GB in %s, its limit; no more are kept", held / GB, place)
        return fits

    # --- what tells them apart ------------------------------------------------------------------------------------

    def _name(self, condition: Condition) -> str | None:
        """The digest of a condition; None of one that is not made of tensors and plain values."""
        if id(condition) not in self._names:
            parts = packed(condition)
            name = None if parts is None else digest(parts[1], *parts[0].values())
            self._names[id(condition)] = condition, name  # held, so that the id stays its own
        return self._names[id(condition)][1]

    def _network(self, condition: Condition, shape: Sequence[int], autocast: str) -> str:
        """What the network makes of fixed noise, in every bit: other weights and patches make something else."""
        known = id(condition), tuple(shape), autocast
        if known not in self._networks:
            shape = tuple(shape) if shape[1] * shape[2] <= _SIDE**2 else (shape[0], _SIDE, _SIDE)
            latents, noise = torch.randn((2, 1, *shape), generator=torch.Generator().manual_seed(0)).to(
                self.denoiser.device
            )
            made = []
            for level in _LEVELS:
                timesteps = self.denoiser.timesteps(torch.tensor([level], dtype=torch.float64))
                step = Step(self.denoiser, latents, noise, timesteps.to(latents.device), (), [condition])
                made.append(step.pretrained())
            self._networks[known] = digest(self.denoiser.prediction_type, *made)
        return self._networks[known]

    # --- files ----------------------------------------------------------------------------------------------------

    def _read(self, file: str, shape: Sequence[int]) -> Tensor | None:
        entry = self._files.load(file)
        anchors = None if entry is None else entry[0].get("anchors")
        if entry is not None and (
            anchors is None or anchors.shape != shape or not bool(torch.isfinite(anchors.float()).all())
        ):
            logger.warning("the anchors in %s are not what was written, and are computed again", file)
            return None
        return anchors

    def _write(self, file: str, anchors: Tensor) -> None:
        if not self._has_room(self._on_disk, anchors, "its folder"):
            return
        try:
            self._files.save(file, {"anchors": anchors.contiguous()})
            self._on_disk += anchors.nbytes
        except ValueError as error:  # a full disk ends no training that does without
            logger.warning("%s; the training goes on without writing anchors", error)
            self._on_disk, self._told = math.inf, True


def _exactly(anchors: Tensor) -> Tensor:
    """In 16 bits if that is the same, else as they are."""
    for dtype in (torch.float16, torch.bfloat16):
        half = anchors.to(dtype)
        if torch.equal(half.to(anchors.dtype), anchors):
            return half
    return anchors
