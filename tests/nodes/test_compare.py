"""The comparison's node in a real ComfyUI, and every workflow against the nodes that it names."""

from __future__ import annotations

import json

import pytest

from tests.comfyui import comfy_server
from tests.nodes.graphs import node

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

VISION = '''
import torch
from comfy.clip_vision import ClipVisionModel

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
         "patch_size": 8, "image_size": 32, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
         "projection_dim": 8, "use_swiglu_ffn": False, "model_type": "clip_vision_model"}


class TinyVision:
    """A CLIP_VISION of ComfyUI's own class at random weights."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["clip_vision_model", "dinov2"],)}}

    def make(self, kind):
        vision = ClipVisionModel({**SMALL, "model_type": kind})
        torch.manual_seed(0)
        for weight in vision.model.parameters():
            weight.data = torch.randn(weight.shape) * 0.3
        return (vision,)


NODE_CLASS_MAPPINGS = {"TinyVision": TinyVision}
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory, encoder_folders):
    base = tmp_path_factory.mktemp("comfyui")
    comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    (base / "custom_nodes/tiny_vision").mkdir()
    (base / "custom_nodes/tiny_vision/__init__.py").write_text(VISION)
    (base / "models/clip_vision").mkdir(parents=True)
    for name in ("clip", "dino"):
        (base / "models/clip_vision" / name).symlink_to(encoder_folders / name, target_is_directory=True)
    server = comfy_server.ComfyServer(*found, base)
    yield server
    server.stop()


def comparison(**changes) -> dict:
    """pip's references (1) as the pictures of `same`, momo's (2) as those of `other`, in a table (3)."""
    inputs = {
        "references": ["1", 1], "pictures.system0": ["2", 0], "pictures.system1": ["1", 0], "names": "other\nsame",
        "prompts": "a photo of a sks star", "token": "sks", "clip": "[connected]", "dino": "[connected]",
    }  # fmt: skip
    return {
        "1": node("AnchorLoadReferences", references="sandbox/pip", size=64),
        "2": node("AnchorLoadReferences", references="sandbox/momo", size=64),
        "3": node("AnchorCompare", **inputs | changes),
        "4": node("PreviewAny", source=["3", 0]),
        "5": node("PreviewImage", images=["3", 1]),
    }


def table(outputs) -> list[list[str]]:
    (text,) = outputs["3"]["text"]
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_sandbox_ranks_the_subjects_own_pictures_first(server):
    outputs = server.run(comparison(clip="sandbox", dino="sandbox"))
    head, _, real, first, second = table(outputs)
    assert head[:4] == ["system", "CLIP-I", "CLIP-T", "DINO"] and [first[0], second[0]] == ["same", "other"]
    assert "n/a" not in first[1:4] and real[2] == "n/a"
    assert server.picture(outputs["5"]).startswith(b"\x89PNG")


def same_from_real(rows, column: int, count: int = 5) -> None:
    """The references as a system's pictures: of count^2 pairs, count are of a picture with itself."""
    real, same = (float(rows[index][column].split()[0]) for index in (2, 3))
    assert rows[3][0] == "same" and same == pytest.approx((real * (count - 1) + 1) / count, abs=2e-3)


def test_connected_encoders_give_clip_i_and_dino_alone(server):
    prompt = comparison(clip_vision=["6", 0], dino_vision=["7", 0])
    prompt |= {"6": node("TinyVision", kind="clip_vision_model"), "7": node("TinyVision", kind="dinov2")}
    rows = table(server.run(prompt))
    same_from_real(rows, 1)
    same_from_real(rows, 3)
    assert rows[3][2] == rows[4][2] == "n/a"


def test_folders_of_transformers_give_all_three(server):
    rows = table(server.run(comparison(clip="clip", dino="dino", names="")))
    assert {rows[3][0], rows[4][0]} == {"system 1", "system 2"}
    assert "n/a" not in rows[3][1:4] and rows[2][2] == "n/a"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "clip and dino are [connected], but neither is"),
        ({"clip": "sandbox", "names": "one"}, "names has 1 lines that differ"),
        ({"clip": "sandbox", "names": "one\none"}, "names has 1 lines that differ"),
        ({"clip": "sandbox", "prompts": "a\nb"}, "prompts of other: has 5 pictures"),
        ({"clip": "sandbox", "prompts": " "}, "prompts of other: has 5 pictures"),
        ({"clip": "dino"}, "model of type vit, but it takes"),
        ({"clip": "elsewhere"}, "elsewhere"),
        ({"clip_vision": ["7", 0]}, "clip_vision is a dinov2, but it takes clip_vision_model"),
    ],
)
def test_wrong_input_is_one_line(server, changes, message):
    prompt = comparison(**changes) | {"7": node("TinyVision", kind="dinov2")}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        server.run(prompt)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- workflows ------------------------------------------------------------------------------------------------------

IMAGE_OPTIONAL = {"attn_mask": "MASK", "image_negative": "IMAGE", "clip_vision": "CLIP_VISION"}
FOREIGN = {
    "IPAdapterUnifiedLoader": {
        "inputs": {"model": "MODEL", "preset": "COMBO", "ipadapter": "IPADAPTER"},
        "outputs": ["MODEL", "IPADAPTER"],
    },
    "IPAdapterAdvanced": {
        "inputs": {
            "model": "MODEL", "ipadapter": "IPADAPTER", "image": "IMAGE", "weight": "FLOAT", "weight_type": "COMBO",
            "combine_embeds": "COMBO", "start_at": "FLOAT", "end_at": "FLOAT", "embeds_scaling": "COMBO",
            **IMAGE_OPTIONAL,
        },
        "outputs": ["MODEL"],
    },
}  # fmt: skip
"""What ComfyUI_IPAdapter_plus 2.0.0 declares of the nodes that a workflow here uses."""
IP_ADAPTER = comfy_server.ROOT / "docs/compare_ip_adapter.json"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
WORKFLOWS = [*sorted((comfy_server.ROOT / "example_workflows").glob("*.json")), IP_ADAPTER]


def declared(type_: str, object_info: dict) -> tuple[dict[str, str], list[str]]:
    """Input -> type, and the outputs' types, as the node itself says."""
    if type_ in FOREIGN:
        return FOREIGN[type_]["inputs"], FOREIGN[type_]["outputs"]
    info, inputs, dynamic = object_info[type_], {}, {}
    for section in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(section, {}).items():
            if kind == "COMFY_AUTOGROW_V3":
                template = options[0]["template"]
                ((part, *_),) = template["input"]["required"].values()
                inputs |= {f"{name}.{template['prefix']}{i}": part for i in range(template["max"])}
            elif kind == "COMFY_DYNAMICCOMBO_V3":
                inputs[name] = kind
                parts = [part for option in options[0]["options"] for part in option["inputs"]["optional"].items()]
                dynamic |= {f"{name}.{part}": spec[0] for part, spec in parts}
            else:
                inputs[name] = "COMBO" if isinstance(kind, list) else kind
    return inputs | dynamic, ["COMBO" if isinstance(kind, list) else kind for kind in info["output"]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_workflow_fits_the_nodes(server, file):
    workflow, object_info = json.loads(file.read_text()), server.get("/object_info")
    nodes = {each["id"]: each for each in workflow["nodes"] if each["type"] != "MarkdownNote"}
    for each in nodes.values():
        inputs, outputs = declared(each["type"], object_info)
        assert {slot["name"]: slot["type"] for slot in each["inputs"]}.items() <= inputs.items(), each["type"]
        assert [slot["type"] for slot in each["outputs"]] == outputs, each["type"]
        assert each["properties"].get("cnr_id") and each["properties"].get("ver"), each["type"]
        slots = [slot["name"] for slot in each["inputs"]]
        fixed = [name for name, kind in inputs.items() if kind in WIDGETS and "." not in name]
        assert set(fixed) <= set(slots), each["type"]
    assert workflow["version"] == 0.4 and workflow["last_node_id"] == max(each["id"] for each in workflow["nodes"])
    links = {link[0]: link for link in workflow["links"]}
    assert workflow["last_link_id"] == max(links)
    for id_, source, out, target, slot, kind in links.values():
        assert id_ in nodes[source]["outputs"][out]["links"] and nodes[target]["inputs"][slot]["link"] == id_
        assert kind in ("*", nodes[source]["outputs"][out]["type"])
        assert nodes[target]["inputs"][slot]["type"] in ("*", nodes[source]["outputs"][out]["type"])
    used = {slot["link"] for each in nodes.values() for slot in each["inputs"]} - {None}
    assert used == set(links)


def test_the_ip_adapter_workflow_compares_both_systems(server):
    """With IP-Adapter's nodes left out, every other value of the workflow is one that ComfyUI takes."""
    workflow = json.loads(IP_ADAPTER.read_text())
    object_info = server.get("/object_info")
    for type_, schema in FOREIGN.items():
        specs = {name: [kind, {}] for name, kind in schema["inputs"].items()}
        object_info[type_] = {"input": {"required": specs}, "input_order": {"required": list(specs)}}
    prompt = comfy_server.to_api(workflow, object_info)
    (compare,) = (entry["inputs"] for entry in prompt.values() if entry["class_type"] == "AnchorCompare")
    assert len(compare["names"].splitlines()) == sum(name.startswith("pictures.") for name in compare)
    assert "IPAdapterAdvanced" in {entry["class_type"] for entry in prompt.values()}
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            spec = object_info[entry["class_type"]]["input"]
            kind, *options = {**spec.get("required", {}), **spec.get("optional", {})}.get(name, ["-"])
            if not isinstance(value, list) and name not in ("ckpt_name", "clip_name") and kind in ("INT", "FLOAT"):
                assert options[0].get("min", value) <= value <= options[0].get("max", value), name
