"""Check-ups of every kind of adapter on SD1.5, SDXL, SD3 and Flux: both backends tell the same numbers of a file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter, save_adapter, to_file_keys
from anchor_core.adapters.formats import convert
from anchor_core.adapters.stated import prompts_of
from anchor_core.evaluation.checkup import check_up
from anchor_core.evaluation.settings import CheckupSettings
from tests.comfyui import comfy_server
from tests.evaluation import twin_models

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

METADATA = {"anchor.subject_prompt": "a photo of a sks dog", "anchor.class_prompt": "a photo of a dog"}
KINDS = {
    "lora": {"rank": 2, "alpha": 4.0},
    "dora": {"rank": 2},
    "lokr": {"rank": 2},
    "loha": {"rank": 2, "alpha": 4.0},
    "oft": {"rank": 4},
    "full": {"rank": 1},
    "svdiff": {"rank": 1},
}
LAYERS = {"sd1": r"attn[12]\.to_[qv]$", "sdxl": r"attn[12]\.to_[qv]$", "sd3": r"attn\.to_[qkv]$|ff\.net\.2$",
          "flux": r"attn\.to_[qkv]$|ff\.net\.2$"}  # fmt: skip
FOREIGN = {"sd1": "kohya", "sdxl": "kohya", "sd3": "kohya", "flux": "kohya"}


def file_of(denoiser, family: str, kind: str, seed: int) -> dict[str, torch.Tensor]:
    adapter = denoiser.attach(AdapterConfig(kind=kind, layers=LAYERS[family], **KINDS[kind]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = to_file_keys(adapter, denoiser.file_keys())
    denoiser.detach()
    return tensors


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Reports by family and kind: of the diffusers backend, as the verb makes them, and of ComfyUI's, as the node."""
    folder, ours = tmp_path_factory.mktemp("twins"), {}
    for family, (kind_of_model, network) in twin_models.FAMILIES.items():
        denoiser = twin_models.build(family)
        channels = 4 if family in ("sd1", "sdxl") else 16
        latents = torch.randn((2, channels, 8, 8), generator=torch.Generator().manual_seed(3))
        (folder / f"{family}.json").write_text(json.dumps([kind_of_model, network]))
        save_file({"latents": latents}, folder / f"{family}.latents.safetensors")
        state = {name: tensor.contiguous() for name, tensor in denoiser.network.state_dict().items()}
        save_file(state, folder / f"{family}.safetensors")
        for seed, kind in enumerate(KINDS):
            tensors = file_of(denoiser, family, kind, seed)
            save_adapter(folder / family / f"{kind}.safetensors", tensors, METADATA)
            if kind == "lora":
                converted = convert(tensors, METADATA | {"modelspec.architecture": denoiser.architecture}, to="kohya")
                save_adapter(folder / family / "kohya.safetensors", converted, METADATA)
        for file in sorted((folder / family).glob("*.safetensors")):
            metadata = load_adapter(file)[1]
            ours.setdefault(family, {})[file.stem] = check_up(
                denoiser, lambda denoiser=denoiser, file=file: attach_file(denoiser, file)[0], metadata,
                prompts_of(metadata), latents=latents, shape=tuple(latents.shape[1:]),
                settings=CheckupSettings(timesteps=2),
            )  # fmt: skip
    script = comfy_server.ROOT / "tests/comfyui/check_checkup.py"
    comfy_server.run_script(script, comfy_server.ROOT, folder, folder=folder)
    return ours, json.loads((folder / "reports.json").read_text())


def same(one, other, path: str = "report") -> None:
    """To 1e-4, of numbers relative to themselves where they are above 1; sentences round the same numbers."""
    if path.endswith(".sentences"):
        assert len(one) == len(other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            same(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            same(*pair, f"{path}.{i}")
    elif isinstance(one, float) or isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4), path
    else:
        assert one == other, path


@pytest.mark.parametrize("kind", [*KINDS, "kohya"])
@pytest.mark.parametrize("family", twin_models.FAMILIES)
def test_both_backends_tell_the_same(both, family, kind):
    one, other = (copy.deepcopy(reports[family][kind]) for reports in both)
    assert one["without_trigger"]["class"]["change"] > 1e-3
    if family in ("sd3", "flux"):  # ComfyUI's networks have queries, keys and values in one layer
        for report in (one, other):
            weights = report["weights"]
            assert sum(each["share"] for each in weights["blocks"]) == pytest.approx(1)
            report["weights"] = {"norm": weights["norm"], "shares": [each["share"] for each in weights["blocks"]]}
            report["verdict"] = report["verdict"]["level"]
    same(one, other)


@pytest.mark.parametrize("family", twin_models.FAMILIES)
def test_the_format_does_not_matter(both, family):
    for reports in both:
        found = [reports[family][name] for name in ("lora", "kohya")]
        for report in found:
            for layer in report["weights"].get("layers", ()):
                layer.pop("kind", None)  # parts of a fused layer may be read as its weight
        same(*found)
