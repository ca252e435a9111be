"""Pictures of any systems in one table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..anchor_core.checks import shown
from ..anchor_core.training.settings import PRECISIONS
from .references import input_subfolder
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
            io.Image.Input("pictures", tooltip="The pictures that one system made of the subject."), "system", 0, 12
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
                    "size. Without any, the references with one another tell whether the encoders are the papers'.",
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
                io.String.Input(
                    "class_word",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="The class's word in the prompts, such as dog: CLIP-T is told of the subject alone and of "
                    "its surroundings alone too, which a subject that has taken over the prompt loses. Empty for "
                    "CLIP-T of whole prompts.",
                ),
                io.Combo.Input(
                    "encoder_dtype",
                    options=list(PRECISIONS[1:]),
                    default="fp32",
                    optional=True,
                    advanced=True,
                    tooltip="What the encoders of a folder compute in: bf16 and fp16 are faster on a card and take "
                    "half of the memory; a score is then off by about 0.001.",
                ),
                io.Int.Input(
                    "encoder_batch",
                    default=32,
                    min=1,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Pictures in a pass of the encoders of a folder: fewer if memory runs out.",
                ),
                io.Combo.Input(
                    "folder",
                    options=[CONNECTED, *folder_paths.get_input_subfolders()],
                    default=CONNECTED,
                    optional=True,
                    advanced=True,
                    tooltip="Several subjects: a folder under input/ (press R after adding one) that holds "
                    "references/subject and system/subject for each, and perhaps prompts.txt. Connected pictures are "
                    "one subject more, of systems of the same names.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The table, as markdown."),
                io.Image.Output(display_name="sheet", tooltip="The references and the first pictures of each system."),
                io.String.Output(
                    display_name="report", tooltip="Everything in the table, and the scores by subject, as JSON."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return _state(one_each(inputs, ("pictures",)).get("folder"))

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._compare(**one_each(inputs, ("pictures",)))

    @classmethod
    def _compare(
        cls, references, names, prompts, token, clip, dino, pictures=None, clip_vision=None, dino_vision=None,
        class_word="", encoder_dtype="fp32", encoder_batch=32, folder=CONNECTED,
    ) -> io.NodeOutput:  # fmt: skip
        from ..anchor_core.evaluation.compare import Comparison, contact_sheet, markdown
        from ..anchor_core.evaluation.picture_folders import class_only, gather_tree, in_order
        from .plot import figure_image

        token, class_word, left_out = token.strip(), class_word.strip(), []
        named = _named(list((pictures or {}).values()), names)
        subjects, classes = ({}, {}) if folder == CONNECTED else gather_tree(_folder_of(folder), token, left_out)
        encoders = _encoders(clip, dino, clip_vision, dino_vision, encoder_dtype, encoder_batch)
        comparison, first = Comparison(encoders, left_out), {}
        bar = comfy.utils.ProgressBar(len(subjects) + 1)
        for subject, found in subjects.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            first = {**comparison.add_files(subject, found, class_word or classes.get(subject)), **first}
            bar.update(1)
        if named or folder == CONNECTED:
            comparison.left_out += [f"{name} of the references" for name in references.left_out]
            comparison.add_references(CONNECTED, references.pixels)
            first = {"": references.pixels, **named, **first}
        asked = [class_only(line, token) for line in prompts.splitlines() if line.strip()]
        for name, made in named.items():
            told = in_order(asked, len(made), f"prompts of {name}:") if encoders.text else None
            comparison.add(name, CONNECTED, made, told, class_word or None)
        result = comparison.result()
        table = markdown(result)
        sheet = figure_image(contact_sheet(first.pop(""), first))
        return io.NodeOutput(table, sheet, json.dumps(result, indent=1, allow_nan=False), ui={"text": [table]})


def _folder_of(name: str) -> Path:
    return input_subfolder(name, "folder")


def _state(folder: str | None) -> str:
    """What changes when a file of the chosen folder does."""
    digest = hashlib.sha256()
    for file in sorted(_folder_of(folder).rglob("*")) if folder not in (None, CONNECTED) else ():
        state = file.lstat()
        digest.update(f"{file}:{state.st_size}:{state.st_mtime_ns}".encode(errors="replace"))
    return digest.hexdigest()


def _named(batches: list, names: str) -> dict[str, list]:
    """Name -> pictures (3, H, W) of each batch; ValueError if the names are not one a batch."""
    from ..anchor_core.data.pictures import from_images

    lines = [shown(line.strip(), 100) for line in names.splitlines() if line.strip()]
    lines = lines if lines and batches else [f"system {number + 1}" for number in range(len(batches))]
    if len(set(lines)) != len(batches) or len(lines) != len(batches):
        raise ValueError(f"names has {len(set(lines))} lines that differ, but it takes one for each of {len(batches)}")
    return {name: from_images(batch, name=f"pictures of {name}").pixels for name, batch in zip(lines, batches)}


def _encoders(clip: str, dino: str, clip_vision, dino_vision, dtype: str = "fp32", batch: int = 32):
    from ..anchor_core.evaluation.encoders import open_encoders, sandbox_encoders
    from ..anchor_core.evaluation.metrics import METRICS, Encoders

    sandbox = sandbox_encoders() if SANDBOX in (clip, dino) else None
    chosen = {"clip": clip, "dino": dino}
    folders = [None if name in (CONNECTED, SANDBOX) else _folder(input, name) for input, name in chosen.items()]
    own = open_encoders(*folders, _device(), dtype, batch) if any(folders) else None
    first = {CONNECTED: None, SANDBOX: sandbox}.get(clip, own)
    second = {CONNECTED: None, SANDBOX: sandbox}.get(dino, own)
    connected = {
        "clip": _connected("clip_vision", clip_vision, ("clip_vision_model",)) if first is None else first.clip,
        "dino": _connected("dino_vision", dino_vision, ("dinov2", "dinov3")) if second is None else second.dino,
    }
    if not any(connected.values()):
        raise ValueError("clip and dino are [connected], but neither is; connect clip_vision or dino_vision, or choose")
    names = {metric: chosen["dino" if metric == "dino" else "clip"] for metric in METRICS}
    return Encoders(**connected, text=None if first is None else first.text, names=names)


def _device():
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
