"""Pictures of any systems in one table."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..anchor_core.checks import shown
from .types import CATEGORY, ReferencesType, one_each

CONNECTED, SANDBOX = "[connected]", "sandbox"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def _folders() -> list[str]:
    """The folders of models/clip_vision that hold a model in transformers' layout."""
    files = (Path(file) for file in folder_paths.get_filename_list("clip_vision"))
    return sorted({file.parent.as_posix() for file in files if file.name in WEIGHTS and file.parent.name})


class AnchorCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        encoders = [CONNECTED, SANDBOX, *_folders()]
        pictures = io.Autogrow.TemplatePrefix(
            io.Image.Input("pictures", tooltip="The pictures that one system made of the subject."), "system", 1, 12
        )
        return io.Schema(
            node_id="AnchorCompare",
            display_name="Compare Pictures",
            category=CATEGORY,
            description=(
                "Ranks pictures of one subject, made by any systems (LoRAs, IP-Adapter, ...), by CLIP-I and DINO "
                "(likeness to the references) and CLIP-T (what the prompt asks for). Real pictures with one another "
                "are in the first row. What is not measured is n/a and does not count for the rank."
            ),
            is_input_list=True,  # for lists of pictures
            inputs=[
                ReferencesType.Input(
                    "references", tooltip="Real pictures of the subject, to which likeness is measured."
                ),
                io.Autogrow.Input(
                    "pictures",
                    pictures,
                    tooltip="A batch, or a list, of pictures of each system. Take the same noise for all: one seed and "
                    "size.",
                ),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    tooltip="The systems' names for the table, a line each, in the order of the inputs.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What the pictures were asked for, a line each, for CLIP-T: one line for all pictures, or "
                    "several, which take as many pictures each, one after another.",
                ),
                io.String.Input(
                    "token",
                    default="sks",
                    tooltip="The subject's word, which is taken out of the prompts: CLIP does not know it.",
                ),
                io.Combo.Input(
                    "clip",
                    options=encoders,
                    default=CONNECTED,
                    tooltip="CLIP-I and CLIP-T: a folder of models/clip_vision with a whole CLIP of transformers, such "
                    "as openai/clip-vit-base-patch32, or the sandbox's judge. A connected CLIP vision has no text "
                    "half: CLIP-I alone.",
                ),
                io.Combo.Input(
                    "dino",
                    options=encoders,
                    default=CONNECTED,
                    tooltip="DINO: a folder of models/clip_vision with a DINO of transformers, such as "
                    "facebook/dino-vits16, the sandbox's judge, or the connected one.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="A CLIP of Load CLIP Vision, for likeness (CLIP-I)."
                ),
                io.ClipVision.Input(
                    "dino_vision",
                    optional=True,
                    tooltip="A DINOv2 or DINOv3 of Load CLIP Vision, for likeness in detail (DINO).",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The table, as markdown."),
                io.Image.Output(display_name="sheet", tooltip="The references and the first pictures of each system."),
            ],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._compare(**one_each(inputs, ("pictures",)))

    @classmethod
    def _compare(
        cls, references, pictures, names, prompts, token, clip, dino, clip_vision=None, dino_vision=None
    ) -> io.NodeOutput:
        from ..anchor_core.evaluation.compare import Comparison, contact_sheet, markdown
        from ..anchor_core.evaluation.picture_folders import class_only, in_order
        from .plot import figure_image

        named = _named(list(pictures.values()), names)
        comparison = Comparison(_encoders(clip, dino, clip_vision, dino_vision))
        comparison.add_references("", references.pixels)
        asked = [class_only(line, token.strip()) for line in prompts.splitlines() if line.strip()]
        for name, made in named.items():
            told = in_order(asked, len(made), f"prompts of {name}:") if comparison.encoders.text else None
            comparison.add(name, "", made, told)
        table = markdown(comparison.result())
        sheet = figure_image(contact_sheet(references.pixels, named))
        return io.NodeOutput(table, sheet, ui={"text": [table]})


def _named(batches: list, names: str) -> dict[str, list]:
    """Name -> pictures (3, H, W) of each batch; ValueError if the names are not one a batch."""
    from ..anchor_core.data.pictures import from_images

    lines = [shown(line.strip(), 100) for line in names.splitlines() if line.strip()]
    lines = lines or [f"system {number + 1}" for number in range(len(batches))]
    if len(set(lines)) != len(batches) or len(lines) != len(batches):
        raise ValueError(f"names has {len(set(lines))} lines that differ, but it takes one for each of {len(batches)}")
    return {name: from_images(batch, name=f"pictures of {name}").pixels for name, batch in zip(lines, batches)}


def _encoders(clip: str, dino: str, clip_vision, dino_vision):
    from ..anchor_core.evaluation.encoders import open_encoders, sandbox_encoders
    from ..anchor_core.evaluation.metrics import Encoders

    sandbox = sandbox_encoders() if SANDBOX in (clip, dino) else None
    chosen = {"clip": clip, "dino": dino}
    folders = [None if name in (CONNECTED, SANDBOX) else _folder(input, name) for input, name in chosen.items()]
    own = open_encoders(*folders, _device()) if any(folders) else None
    first = {CONNECTED: None, SANDBOX: sandbox}.get(clip, own)
    second = {CONNECTED: None, SANDBOX: sandbox}.get(dino, own)
    connected = {
        "clip": _connected("clip_vision", clip_vision, ("clip_vision_model",)) if first is None else first.clip,
        "dino": _connected("dino_vision", dino_vision, ("dinov2", "dinov3")) if second is None else second.dino,
    }
    if not any(connected.values()):
        raise ValueError("clip and dino are [connected], but neither is; connect clip_vision or dino_vision, or choose")
    return Encoders(**connected, text=None if first is None else first.text)


def _device():
    import comfy.model_management

    return comfy.model_management.text_encoder_device()


def _folder(input: str, name: str) -> Path:
    paths = (folder_paths.get_full_path("clip_vision", f"{name}/{file}") for file in WEIGHTS)
    path = next((path for path in paths if path is not None), None)
    if path is None:
        raise ValueError(
            f"{input} is {shown(repr(name))}, which holds no {' or '.join(WEIGHTS)} in models/clip_vision; choose "
            "another of the list"
        )
    return Path(path).parent


def _connected(name: str, vision, kinds: tuple[str, ...]):
    """A picture encoder of a CLIP_VISION: CLIP's projected embedding, DINO's class token."""
    import torch

    if vision is None:
        return None
    if vision.model_type not in kinds:
        raise ValueError(f"{name} is a {vision.model_type}, but it takes {' or '.join(kinds)}; connect such a model")

    def embed(picture) -> torch.Tensor:
        out = vision.encode_image(picture[None].movedim(1, -1))
        return out["image_embeds"] if "clip_vision_model" in kinds else out["last_hidden_state"][:, 0]

    return lambda pictures: torch.cat([embed(picture) for picture in pictures]).float().cpu()
