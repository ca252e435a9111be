"""What a training is given: reference pictures and the concept."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..anchor_core.concept import Concept
from ..anchor_core.data.folder import listed
from ..anchor_core.data.picked import load_picked, parse
from ..anchor_core.data.pictures import bucket_sizes, from_images, load_references
from ..anchor_core.sandbox import subjects
from ..anchor_core.training.settings import DataSettings
from . import pictures as input_folder
from .types import CATEGORY, ConceptType, ReferencesType, inputs_of, one_each

PICKED = "[pictures on the node]"
SANDBOX = "sandbox/"
WIDGET = "ANCHOR_PICTURES"
"""That of web/anchor.js; without that script the input is a socket for a text."""
MASK_TOOLTIP = (
    "1 (white) is learnt, the rest does not come along. The MASK of Load Image is 1 where the picture is "
    "transparent: switch invert_masks on for that."
)


def invert_masks_input(advanced: bool = False) -> io.Boolean.Input:
    """The switch beside an input of masks; `from_images` takes it under the same name."""
    return io.Boolean.Input(
        "invert_masks",
        default=False,
        optional=True,
        advanced=advanced or None,
        tooltip="The masks are those of Load Image, 1 where a picture is transparent: what is not transparent is "
        "learnt.",
    )


class AnchorLoadReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        own = [f"{SANDBOX}{name}" for name in subjects.names()]
        return io.Schema(
            node_id="AnchorLoadReferences",
            display_name="Load References",
            category=CATEGORY,
            description=(
                "The pictures of one subject: those dropped on the node, a folder under input/, or a subject of the "
                "sandbox's world."
            ),
            search_aliases=["dreambooth", "load images", "load images from folder"],
            inputs=[
                io.Combo.Input(
                    "references",
                    options=[PICKED, *own, *folder_paths.get_input_subfolders()],
                    tooltip="3 to 20 pictures of one subject: sharp ones, in several surroundings, without others of "
                    "its kind. Those below, or a folder under input/ (press R after adding one), or sandbox/..., drawn "
                    "subjects for the embedded model.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Side in pixels: the centre square of each picture is resized to it. What the model draws "
                    "at: 512 for SD1.5, 1024 for SDXL and later; smaller trains faster and learns less detail. The "
                    "sandbox's pictures are 64 x 64 always.",
                ),
                *inputs_of(
                    DataSettings,
                    ("buckets", "captions", "masks"),
                    optional=True,  # they are later than the node, and a saved prompt may lack them
                    buckets="references only: keep the pictures' shapes, at sizes of about size x size in area. Off "
                    "cuts the centre square, and perhaps the subject",
                    captions="references only: read name.txt beside each picture of a folder, which names the subject "
                    "by its words (sks dog). What it says besides is learnt less as part of the subject",
                    masks="references only: learn only what is white in name-masklabel.png of a folder, or else "
                    "opaque in the alpha channel: surroundings outside of it do not come along. What is painted below "
                    "counts without this",
                ),
                io.String.Input(
                    "pictures",
                    default="",
                    optional=True,
                    socketless=False,
                    extra_dict={"widgetType": WIDGET},
                    tooltip="Drop, paste or add pictures here. A caption under one names the subject by its words (sks "
                    "dog); what it says besides is learnt less as part of the subject. What is painted as its mask "
                    "is learnt, the rest does not come along. The frame is what the training sees.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures as one batch of squares."),
                ReferencesType.Output(display_name="references", tooltip="With their captions, masks and shapes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, references: str, size: int, pictures: str = "", **options):
        digest = hashlib.sha256(f"{references}:{size}:{options}".encode())
        if references == PICKED:
            digest.update(str(pictures).encode())
            for pair in input_folder.files_of(parse(pictures or "")):
                digest.update("".join(input_folder.sha256_of(file) for file in pair if file).encode())
        elif not references.startswith(SANDBOX) and input_subfolder(references).is_dir():
            for file in sorted(input_subfolder(references).iterdir()):
                state = file.lstat()  # links that lead out are not read, and others are files of the folder themselves
                digest.update(f"{file.name}:{state.st_size}:{state.st_mtime_ns}".encode(errors="replace"))
        return digest.hexdigest()

    @classmethod
    def execute(
        cls, references: str, size: int, buckets=False, captions=False, masks=False, pictures=""
    ) -> io.NodeOutput:
        import numpy
        import torch

        if references.startswith(SANDBOX):
            drawn = subjects.get(references.removeprefix(SANDBOX)).references()
            arrays = [numpy.asarray(picture.convert("RGB")) for picture in drawn]
            images = torch.from_numpy(numpy.stack(arrays)).float() / 255
            return io.NodeOutput(images, from_images(images))
        if references == PICKED:
            picked = parse(pictures)
            read = partial(load_picked, picked, input_folder.files_of(picked), masks=masks)
        else:
            read = partial(load_references, input_subfolder(references), captions=captions, masks=masks)
        own = read(bucket_sizes(size) if buckets else size)
        squares = read(size) if buckets else own
        told = [f"left out: {listed(list(own.left_out))}"] if own.left_out else []
        return io.NodeOutput(squares.stack().movedim(1, -1), own, ui={"text": told})


def input_subfolder(name: str, input: str = "references") -> Path:
    """A folder under input/; ValueError, naming the node's input, if it is not."""
    root = folder_paths.get_input_directory()
    folder = Path(root) / name
    if not folder_paths.is_within_directory(root, str(folder)):
        raise ValueError(f"{input} is {name!r}, but it takes a folder inside input/")
    return folder


class AnchorImageReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorImageReferences",
            display_name="References from Images",
            category=CATEGORY,
            description=(
                "Pictures of other nodes, as batches or lists of any sizes, with their texts and masks, for one "
                "training: such as those of Load Image-Text (from Folder)."
            ),
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="A batch, or a list of pictures of several sizes: 3 to 20 of one subject."
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side in pixels: the centre square of each picture is resized to it. 512 for SD1.5, 1024 "
                    "for SDXL and later. 0 for as they are.",
                ),
                *inputs_of(
                    DataSettings,
                    ("buckets",),
                    buckets="keep the pictures' shapes, at sizes of about size x size in area. Off cuts the centre "
                    "square",
                ),
                io.Mask.Input("masks", optional=True, tooltip=f"One for each picture: {MASK_TOOLTIP}"),
                invert_masks_input(),
                io.String.Input(
                    "captions",
                    force_input=True,
                    optional=True,
                    tooltip="A text for each picture, which names the subject by its words (sks dog). What it says "
                    "besides is learnt less as part of the subject. Plain text: (word:1.5) is no weight.",
                ),
            ],
            outputs=[ReferencesType.Output(display_name="references", tooltip="For Train Anchored LoRA.")],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._gather(**one_each(inputs, ("images", "masks", "captions")))

    @classmethod
    def _gather(cls, images, size, buckets, invert_masks=False, masks=None, captions=None) -> io.NodeOutput:
        if buckets and not size:
            raise ValueError("buckets is on and size is 0; give the size that the buckets are of")
        sizes = bucket_sizes(size) if buckets else size or None
        return io.NodeOutput(from_images(images, sizes, masks, captions=captions, invert_masks=invert_masks))


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
                    tooltip="A rare word that means nothing to the model yet, such as sks, and stands for the subject "
                    "in prompts. A word with a meaning mixes it in.",
                ),
                io.String.Input(
                    "class_word",
                    default="dog",
                    tooltip="What the subject is, in a word or two: dog, stuffed animal. The anchor holds the subject "
                    "to what the model knows of it, so take the word that draws the nearest pictures.",
                ),
                io.String.Input(
                    "template",
                    default="a photo of a {}",
                    tooltip="The prompt around the words; {} is replaced by them. As plain as the pictures: a photo of "
                    "a {}, a drawing of {}.",
                ),
            ],
            outputs=[
                ConceptType.Output(display_name="concept", tooltip="Both prompts, for training and measuring."),
                io.String.Output(display_name="subject_prompt", tooltip="Such as: a photo of a sks dog."),
                io.String.Output(display_name="class_prompt", tooltip="Such as: a photo of a dog."),
            ],
        )

    @classmethod
    def validate_inputs(cls, token=None, class_word=None, template=None):
        if None in (token, class_word, template):  # one is connected, and known at the run alone
            return True
        try:
            return Concept.from_words(token, class_word, template) is not None
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, token: str, class_word: str, template: str) -> io.NodeOutput:
        concept = Concept.from_words(token, class_word, template)
        return io.NodeOutput(concept, concept.subject_prompt, concept.class_prompt)
