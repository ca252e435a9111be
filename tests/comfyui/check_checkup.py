"""Run under ComfyUI's interpreter: check-ups of adapter files on the twins of diffusers' networks, as the node does.

Usage: check_checkup.py COMFYUI PACK FOLDER. `FOLDER/<family>.json` is ComfyUI's class and the network's config,
`<family>.safetensors` the weights by diffusers' names, `<family>.latents.safetensors` the latents, and
`<family>/<kind>.safetensors` the files. `FOLDER/reports.json` becomes a report for each family and kind.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

comfyui, pack, folder = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_detection  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_models as models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from anchor_core.adapters.attach import attach_tensors  # noqa: E402
from anchor_core.adapters.file import load_adapter  # noqa: E402
from anchor_core.adapters.stated import prompts_of  # noqa: E402
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser  # noqa: E402
from anchor_core.evaluation.checkup import check_up  # noqa: E402
from anchor_core.evaluation.settings import CheckupSettings  # noqa: E402

FOLDER = Path(folder)


def twin(family: str):
    """MODEL, CLIP and VAE with the weights of diffusers' network, by ComfyUI's own conversion of names."""
    kind, network = json.loads((FOLDER / f"{family}.json").read_text())
    models.FAMILIES[family] = models.Family(getattr(supported, kind), network, fixed_length=family in ("sd1", "sdxl"))
    model, clip, vae = models.build(family)
    state = load_file(FOLDER / f"{family}.safetensors")
    if family in ("sd1", "sdxl"):
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        state = {names[key]: tensor for key, tensor in state.items()}
    else:
        state = comfy.model_detection.convert_diffusers_mmdit(state, "")
    own = model.model.diffusion_model
    missing, unexpected = own.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model, clip, vae


def main() -> None:
    reports: dict[str, dict] = {}
    settings = CheckupSettings(timesteps=2)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        for place in sorted(FOLDER.glob("*.json")):
            family = place.stem
            model, clip, vae = twin(family)
            latents = load_file(FOLDER / f"{family}.latents.safetensors")["latents"]
            for file in sorted((FOLDER / family).glob("*.safetensors")):
                tensors, metadata = load_adapter(file)
                with ComfyDenoiser(model, clip, vae) as denoiser:
                    reports.setdefault(family, {})[file.stem] = check_up(
                        denoiser, partial(attach_tensors, denoiser, tensors, metadata), metadata,
                        prompts_of(metadata), latents=latents, shape=tuple(latents.shape[1:]), settings=settings,
                    )  # fmt: skip
    (FOLDER / "reports.json").write_text(json.dumps(reports, allow_nan=False))


main()
