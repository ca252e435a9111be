"""What a training is given: reference pictures and the concept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..anchor_core.data import Concept, load_references
from ..anchor_core.sandbox import subjects
from .types import CATEGORY, ConceptType

SANDBOX = "sandbox/"


class AnchorLoadReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        own = [f"{SANDBOX}{name}" for name in subjects.names()]
        return io.Schema(
            node_id="AnchorLoadReferences",
            display_name="Load References",
            category=CATEGORY,
            description="The pictures of one subject: a folder under input/, or a subject of the sandbox's world.",
            search_aliases=["dreambooth", "load images from folder"],
            inputs=[
                io.Combo.Input(
                    "references",
                    options=own + folder_paths.get_input_subfolders(),
                    tooltip="A folder under input/ with 3 to 20 pictures of one subject, or sandbox/<subject>.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Side in pixels: the centre square of each picture is resized to it. "
                    "The sandbox's pictures are 64 x 64 always.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The pictures as one batch.")],
        )

    @classmethod
    def fingerprint_inputs(cls, references: str, size: int):
        digest = hashlib.sha256(f"{references}:{size}".encode())
        if not references.startswith(SANDBOX) and _folder(references).is_dir():
            for file in sorted(_folder(references).iterdir()):
                digest.update(f"{file.name}:{file.stat().st_mtime_ns}".encode())
        return digest.hexdigest()

    @classmethod
    def execute(cls, references: str, size: int) -> io.NodeOutput:
        import numpy
        import torch

        if references.startswith(SANDBOX):
            pictures = subjects.get(references.removeprefix(SANDBOX)).references()
            arrays = [numpy.asarray(picture.convert("RGB")) for picture in pictures]
            return io.NodeOutput(torch.from_numpy(numpy.stack(arrays)).float() / 255)
        return io.NodeOutput(load_references(_folder(references), size).stack().movedim(1, -1))


def _folder(name: str) -> Path:
    root = folder_paths.get_input_directory()
    folder = Path(root) / name
    if not folder_paths.is_within_directory(root, str(folder)):
        raise ValueError(f"references is {name!r}, but it takes a folder inside input/")
    return folder


class AnchorConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorConcept",
            display_name="Concept",
            category=CATEGORY,
            description=(
                "What is taught and what it is anchored to: the subject prompt names the subject by a rare word and "
                "its class, the class prompt names the class alone."
            ),
            inputs=[
                io.String.Input(
                    "token",
                    default="sks",
                    tooltip="A rare word that means nothing to the model yet, such as sks. It stands for the subject.",
                ),
                io.String.Input(
                    "class_word", default="dog", tooltip="What the subject is, in a word or two: dog, stuffed animal."
                ),
                io.String.Input(
                    "template",
                    default="a photo of a {}",
                    tooltip="The prompt around the words; {} is replaced by them.",
                ),
            ],
            outputs=[
                ConceptType.Output(display_name="concept", tooltip="Both prompts, for training and measuring."),
                io.String.Output(display_name="subject_prompt", tooltip="Such as: a photo of a sks dog."),
                io.String.Output(display_name="class_prompt", tooltip="Such as: a photo of a dog."),
            ],
        )

    @classmethod
    def execute(cls, token: str, class_word: str, template: str) -> io.NodeOutput:
        if not class_word.strip():
            raise ValueError("class_word is empty, but it takes what the subject is, such as dog")
        if template.count("{}") != 1:
            raise ValueError(f"template is {template!r}, but it takes a text with one {{}} for the words")
        concept = Concept(template.replace("{}", f"{token} {class_word}"), template.replace("{}", class_word))
        return io.NodeOutput(concept, concept.subject_prompt, concept.class_prompt)
