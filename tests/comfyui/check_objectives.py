"""Run under ComfyUI's interpreter: the objectives in its backend, for `test_objectives_comfyui.py`.

Usage: check_objectives.py COMFYUI PACK WEIGHTS FOLDER. `FOLDER/results.json` becomes the outcomes of
`objective_parts`, and what is wrong by check, or "".
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

comfyui, pack, weights, folder = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import contract  # noqa: E402
import objective_parts  # noqa: E402
import torch  # noqa: E402
from objective_parts import CONCEPT, PARTS, SHAPE  # noqa: E402

from anchor_core.adapters.config import AdapterConfig  # noqa: E402
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser  # noqa: E402
from anchor_core.sandbox.comfyui import load  # noqa: E402
from anchor_core.training.preview import Preview  # noqa: E402
from anchor_core.training.settings import TrainSettings  # noqa: E402


def train_node():
    """The pack's own module of the node, which is a package inside ComfyUI."""
    init = Path(pack) / "__init__.py"
    spec = importlib.util.spec_from_file_location("anchor_pack", init, submodule_search_locations=[pack])
    sys.modules["anchor_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["anchor_pack"])
    return importlib.import_module("anchor_pack.nodes.train")


def check_anchor(denoiser) -> None:
    objective_parts.check_anchor_is_the_pretrained_models(denoiser)


def check_preview(denoiser) -> None:
    """A preview is of both prompts as the text encoder is now, and leaves no graph behind."""
    adapter = denoiser.attach(AdapterConfig(**PARTS["lora with text"]))
    try:
        contract.stir(adapter)
        preview = Preview(denoiser, CONCEPT, SHAPE, 5.0, 0)
        pretrained = denoiser.encode_prompts([CONCEPT.subject_prompt, ""])
        for condition, old in zip(preview.conditions(), pretrained):
            assert not condition.cross_attention.requires_grad
            assert not torch.allclose(condition.cross_attention, old.cross_attention, atol=1e-4)
        picture = preview.picture()
        assert picture.ndim == 3 and picture.shape[0] == 3 and not picture.requires_grad
    finally:
        denoiser.detach()


def check_class_count(denoiser) -> None:
    settings = TrainSettings(objective="prior_preservation")
    try:
        train_node()._class_pictures(settings, None, 0)
    except ValueError as error:
        assert str(error).startswith("class_count is 0"), error
    else:
        raise AssertionError("class_count 0 is not refused")


results = {}
with torch.inference_mode():  # as ComfyUI runs every prompt
    with ComfyDenoiser(*load(Path(weights), [])) as denoiser:
        results["outcomes"] = objective_parts.outcomes(denoiser)
        for check in (check_anchor, check_preview, check_class_count):
            results[check.__name__] = contract.outcome(check, denoiser)
(Path(folder) / "results.json").write_text(json.dumps(results))
