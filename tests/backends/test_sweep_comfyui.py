"""Every class of models that ComfyUI knows trains with the contract's main checks, or is refused in a sentence.

All of it runs in one process under ComfyUI's interpreter (`check_sweep.py`); skipped where there is no ComfyUI.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.comfyui import check_sweep, comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

TRAINS = {
    "HunyuanVideoSkyreelsI2V": "a picture concatenated, as for SD1's and SDXL's inpainting models, which take longer",
    "FluxInpaint": "a picture and a mask concatenated by code of its own",
    "CosmosT2IPredict2": "flow whose x is scaled",
    "ErnieImage": "a fused kernel without a gradient",
    "PixelDiTT2I": "pixels instead of latents, and blocks that write in place",
}
REFUSED = {
    "StableAudio": "makes sound",
    "ACEStep": "makes sound",
    "LTXAV": "video and sound in one latent",
    "SVD_img2vid": "takes no prompt",
    "WAN22_S2V": "follows a recording of sound",
    "WAN21_SCAIL2": "follows the movements of another",
    "Hunyuan3Dv2mini": "shapes in 3D",
    "Trellis2": "shapes in 3D",
    "SAM31": "makes none",
    "LotusD": "depth or the normals",
    "SeedVR2": "refines or enlarges",
    "CosmosT2V": "samples by ModelSamplingContinuousEDM",
}


def swept(folder, *names: str) -> dict[str, dict]:
    """By class, or by class and kind of file."""
    output = folder / "sweep.json"
    comfy_server.run_script(check_sweep.__file__, comfy_server.ROOT, output, *names, folder=folder)
    return {f"{one['class']}:{one['kind']}".removesuffix(":"): one for one in json.loads(output.read_text())}


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> dict[str, dict]:
    return swept(tmp_path_factory.mktemp("sweep"), *TRAINS, *REFUSED)


@pytest.mark.parametrize("name", list(TRAINS))
def test_trains(some, name):
    wrong = {check: message for check, message in some[name]["checks"].items() if message}
    assert not wrong, "\n".join(wrong.values())


@pytest.mark.parametrize(("name", "reason"), list(REFUSED.items()))
def test_is_refused_by_what_it_is(some, name, reason):
    text = some[name]["refused"]
    assert reason in text and "\n" not in text and "; connect " in text


@pytest.mark.long
def test_every_model_trains_or_is_refused(tmp_path):
    """And the page that says which is the sweep's."""
    page = comfy_server.ROOT / "docs" / "MODELS.md"
    spec = importlib.util.spec_from_file_location("models_page", page.with_name("models.py"))
    models_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models_page)
    results = swept(tmp_path)
    wrong = [
        f"{name}, {check}: {message}"
        for name, one in results.items()
        for check, message in one.get("checks", {}).items()
        if message
    ]
    assert not wrong, "\n".join(wrong)
    assert page.read_text() == models_page.write(list(results.values()), models_page.comfyui_version(found[0]))
