"""Latents and text embeddings by content: made once in a run, and once for good where a folder is given."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Condition, Denoiser
from ..writing import try_folder, whole
from .digest import digest

logger = logging.getLogger(__name__)

_PROBE_PROMPT = "a photo of a red square, 1"


class Cache:
    """Latents and conditions of one denoiser, by what is in the picture or prompt.

    On disk, an entry's name is the sha256 of its content and of the encoder's fingerprint: what the encoder makes of a
    fixed picture, or prompt, in every bit. So other weights, settings, dtypes and patches are other entries, whatever
    the backend. An entry that cannot be read, or whose content is not what was written, is made again. Conditions are
    kept on disk if they are made of tensors and plain values, in tuples, lists, dicts or a dataclass; others in memory
    only. A
    prompt that names an embedding file is known by its text alone.

    Args:
        denoiser: the adapter may be attached; the encoders' own adapters are off in what is cached.
        folder: made if it does not exist.

    Raises:
        ValueError: if the folder cannot be written, at once or later.
    """

    def __init__(self, denoiser: Denoiser, folder: str | Path | None = None):
        self.denoiser = denoiser
        self.folder = None if folder is None else Path(folder)
        self._latents: dict[str, Tensor] = {}
        self._conditions: dict[str, Condition] = {}
        if self.folder is not None:
            with self._writing():
                try_folder(self.folder)

    def latents(self, pictures: Sequence[Tensor], gap: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Scaled latents, (C, h, w) each, float32 on the CPU, of pictures (3, H, W) in [0, 1] of any sizes.

        `gap` is called before each that is encoded.

        Raises:
            ValueError: if the autoencoder makes NaN or infinite latents, as some do in fp16.
        """
        names = [digest("picture", picture) for picture in pictures]
        with ExitStack() as stack:
            encoding = False
            for name, picture in zip(names, pictures):
                if name in self._latents:
                    continue
                known = self.load(self._latent_file(name)) if self.folder is not None else None
                if known is not None:
                    self._latents[name] = known[0]["latents"]
                    continue
                if not encoding:
                    encoding = True
                    stack.enter_context(self.denoiser.encoding())
                gap()
                # Alone: its last bits depend on what is encoded beside it, which would depend on what is known already.
                (latents,) = self.denoiser.encode_images(picture.unsqueeze(0)).detach().to("cpu", torch.float32)
                self._keep_latents(name, latents.clone(memory_format=torch.contiguous_format))
        return [self._latents[name] for name in names]

    def _keep_latents(self, name: str, latents: Tensor) -> None:
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("the autoencoder makes NaN or infinite latents; load it in float32 or bfloat16")
        if self.folder is not None:
            self.save(self._latent_file(name), {"latents": latents})
        self._latents[name] = latents

    def _latent_file(self, name: str) -> str:
        return f"latents-{digest(self._image_fingerprint, name)}.safetensors"

    def made(self, kind: str, parts: Sequence[str | Tensor], make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, float32 on the CPU, by what it depends on: made once for good where there is a folder."""
        if self.folder is None:
            return make().detach().to("cpu", torch.float32)
        name = f"{kind}-{digest(*parts)}.safetensors"
        known = self.load(name)
        if known is not None:
            return known[0]["made"]
        tensor = make().detach().to("cpu", torch.float32).contiguous()
        self.save(name, {"made": tensor})
        return tensor

    def condition(self, prompt: str) -> Condition:
        """`denoiser.encode_prompt(prompt)`, always the same object for a prompt."""
        return self.conditions([prompt])[0]

    def conditions(self, prompts: Sequence[str]) -> list[Condition]:
        """`condition` of each; those that are not known are encoded together."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._conditions]
        if missing:
            found = self.denoiser.encode_prompts(missing) if self.folder is None else map(self._stored, missing)
            self._conditions |= zip(missing, found)
        return [self._conditions[prompt] for prompt in prompts]

    def digests(self) -> dict[str, str]:
        """sha256 of what each prompt that was asked for became, by prompt; without those that are no tensors."""
        made = {}
        for prompt, condition in sorted(self._conditions.items()):  # one at a time on the CPU
            parts = packed(condition)
            if parts is not None:
                made[prompt] = digest(*parts[0].values())
        return made

    def _encoded(self, prompt: str) -> Condition:
        return self.denoiser.encode_prompt(prompt)

    def _stored(self, prompt: str) -> Condition:
        model, fingerprint = self._text_fingerprint
        if fingerprint is None:
            return self._encoded(prompt)
        name = f"condition-{digest(fingerprint, prompt)}.safetensors"
        known = self.load(name)
        if known is not None:
            return _unpack(known[1], known[0], model, self.denoiser.device)
        condition = self._encoded(prompt)
        parts = packed(condition)
        if parts is not None:
            self.save(name, *parts)
        return condition

    @cached_property
    def _image_fingerprint(self) -> str:
        # A ramp of every colour and direction, at a size that every autoencoder takes.
        line = torch.linspace(0, 1, 64)
        ramp = torch.stack([line.expand(64, 64), line.flip(0).view(64, 1).expand(64, 64), line.outer(line)])
        return digest("image encoder", self.denoiser.encode_images(ramp.unsqueeze(0)))

    @cached_property
    def _text_fingerprint(self) -> tuple[Condition, str | None]:
        """A condition as a model for others, and the fingerprint; None if such conditions cannot be stored."""
        condition = self._encoded(_PROBE_PROMPT)
        parts = packed(condition)
        if parts is None:
            logger.info("conditions of type %s are cached in memory only", type(condition).__name__)
            return condition, None
        tensors, layout = parts
        return condition, digest("text encoder", layout, *tensors.values())

    # --- files ------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"the cache folder {self.folder} cannot be written ({error.strerror}); "
                "free space, give another folder, or train without one"
            ) from error

    def save(self, name: str, tensors: Mapping[str, Tensor], layout: str = "") -> None:
        from safetensors.torch import save

        check = digest(layout, *(tensors[key] for key in sorted(tensors)))
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(self.folder / name) as part:
                part.write_bytes(save(dict(tensors), {"layout": layout, "sha256": check}))

    def load(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """Tensors and layout of an entry; None if there is none, or none that can be used."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
                metadata = file.metadata() or {}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("the cache's %s cannot be read (%s), and is made again", path, error)
            return None
        layout = metadata.get("layout", "")
        if metadata.get("sha256") != digest(layout, *tensors.values()):
            logger.warning("the cache's %s is damaged, and is made again", path)
            return None
        return tensors, layout


def packed(condition: Condition) -> tuple[dict[str, Tensor], str] | None:
    """A condition as tensors by name and a JSON layout; None if it holds anything but tensors and plain values."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"{len(tensors):03}"
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name, "on_device": value.device.type != "cpu"}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"dict": {key: pack(part) for key, part in value.items()}}
        if type(value) in (tuple, list):
            return {type(value).__name__: [pack(part) for part in value]}
        if value is None or type(value) in (bool, int, float, str):
            return {"plain": value}
        raise TypeError(type(value).__name__)

    try:
        if is_dataclass(condition):
            layout = {"fields": {f.name: pack(getattr(condition, f.name)) for f in fields(condition) if f.init}}
        else:
            layout = pack(condition)
    except TypeError:
        return None
    return tensors, json.dumps(layout)


def _unpack(layout: str, tensors: Mapping[str, Tensor], model: Condition, device: torch.device) -> Condition:
    """The condition that was packed; `model` is another one of its type."""

    def unpack(part: Mapping[str, Any]) -> Any:
        if "tensor" in part:
            tensor = tensors[part["tensor"]]
            return tensor.to(device) if part["on_device"] else tensor
        if "dict" in part:
            return {key: unpack(value) for key, value in part["dict"].items()}
        for kind in (tuple, list):
            if kind.__name__ in part:
                return kind(unpack(value) for value in part[kind.__name__])
        return part["plain"]

    read = json.loads(layout)
    if "fields" in read:
        return type(model)(**{name: unpack(value) for name, value in read["fields"].items()})
    return unpack(read)
