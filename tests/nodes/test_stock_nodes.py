"""Every stock node between loader and training: a MODEL that went through it trains, or is refused in a sentence."""

from __future__ import annotations

import pytest

from tests.comfyui import comfy_server
from tests.nodes.graphs import node, training

found = comfy_server.find()
pytestmark = [pytest.mark.skipif(isinstance(found, str), reason=str(found)), pytest.mark.long]

LINKS = {"MODEL": ["1", 0], "CLIP": ["1", 1], "VAE": ["1", 2], "IMAGE": ["2", 0]}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def stock_nodes(info: dict) -> list[str]:
    """Of ComfyUI's own, what takes and gives a MODEL."""
    names = []
    for name, each in info.items():
        kinds = [spec[0] for spec in each["input"].get("required", {}).values()]
        own = each["python_module"].partition(".")[0] in ("nodes", "comfy_extras")
        if own and "MODEL" in kinds and "MODEL" in each["output"]:
            names.append(name)
    return sorted(names)


def value_of(spec: list):
    """A node's input at its default; KeyError if there is none that could be made."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, str) and kind in LINKS:
        return LINKS[kind]
    choices = kind if isinstance(kind, list) else options.get("options", ()) if kind == "COMBO" else ()
    if choices and not isinstance(choices[0], dict):
        return options.get("default", choices[0])
    if isinstance(kind, str) and kind in WIDGETS:
        return options.get("default", {"STRING": "", "BOOLEAN": False}.get(kind, options.get("min", 0)))
    raise KeyError(kind)


def through(name: str, info: dict) -> dict:
    """A training of two steps on the embedded model after a node at its defaults."""
    inputs = {key: value_of(spec) for key, spec in info[name]["input"].get("required", {}).items()}
    given = {"model": ["9", info[name]["output"].index("MODEL")], "steps": 2, "batch_size": 1, "preview_every": 0}
    prompt = {**training(**given), "9": node(name, **inputs), "5": node("PreviewAny", source=["4", 4])}
    return prompt


def test_every_stock_node(server):
    info = server.get("/object_info")
    trained, refused, unmade, wrong = [], {}, [], {}
    for name in stock_nodes(info):
        try:
            entry = server.wait(server.queue(through(name, info)), 600)
        except (KeyError, ValueError):  # an input that a sweep cannot make
            unmade.append(name)
            continue
        error = next((data for kind, data in entry["status"]["messages"] if kind == "execution_error"), None)
        if error is None:
            trained.append(name)
        elif error["node_id"] == "9":  # the node itself does not take this model
            unmade.append(name)
        elif error["exception_type"] == "ValueError" and "; connect " in error["exception_message"]:
            refused[name] = error["exception_message"].strip()
        else:
            wrong[name] = f"{error['exception_type']}: {error['exception_message']}"
    print(f"\ntrained: {', '.join(trained)}\nnot made: {', '.join(unmade)}")
    print("\n".join(f"refused {name}: {text}" for name, text in refused.items()))
    assert not wrong
    assert len(trained) >= 60 and len(unmade) < 25
    assert {"FreeU", "FreeU_V2", "EasyCache", "LazyCache", "TorchCompileModel"} <= set(trained)
    assert all("\n" not in text for text in refused.values())


def test_the_sandbox_model_under_the_stock_training(server):
    server.run(
        {
            "1": node("AnchorSandboxModel"),
            "2": node("AnchorLoadReferences", references="sandbox/pip", size=64),
            "6": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
            "7": node("CLIPTextEncode", clip=["1", 1], text="a photo of a sks star"),
            "8": node(
                "TrainLoraNode", model=["1", 0], latents=["6", 0], positive=["7", 0], batch_size=1,
                grad_accumulation_steps=1, steps=2, learning_rate=1e-4, rank=4, optimizer="AdamW",
                loss_function="MSE", seed=0, training_dtype="fp32", lora_dtype="fp32", algorithm="LoRA",
                gradient_checkpointing=False, checkpoint_depth=1, offloading=False, existing_lora="[None]",
                bucket_mode=False, bypass_mode=False, quantized_backward=False,
            ),
            "9": node("LossGraphNode", loss=["8", 1], filename_prefix="loss"),
        }
    )  # fmt: skip
