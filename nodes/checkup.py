"""The check-up of a LoRA."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..anchor_core.evaluation.settings import CheckupSettings
from ..anchor_core.writing import claimed
from .types import CATEGORY, LoraModel, checked_lora, inputs_of, one_each, seed_input
from .written import WRITTEN


class AnchorCheckup(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorCheckup",
            display_name="LoRA Check-up",
            category=CATEGORY,
            description=(
                "What any LoRA, made here or downloaded, does to pictures with its trigger word and without it, in "
                "which blocks, at which strength it is too much, and what to sample it with. Writes a page with plots "
                "under output/checkups."
            ),
            is_input_list=True,  # for lists of pictures
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its autoencoder."),
                LoraModel.Input("lora", tooltip="The LoRA, of Load Adapter or Train Anchored LoRA."),
                io.String.Input(
                    "subject_prompt",
                    default="",
                    tooltip="A prompt with the LoRA's trigger word, such as a photo of a sks dog. Empty: what its file "
                    "says or lets one guess; if it does not, nothing is said of the word.",
                ),
                io.String.Input(
                    "class_prompt",
                    default="",
                    tooltip="The same without the word, such as a photo of a dog. Empty: what the file says or lets "
                    "one guess.",
                ),
                *inputs_of(CheckupSettings, ["budget", "timesteps", "noises", "count", "steps"]),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Size of the class pictures that the model makes to measure on: the one it draws best at.",
                ),
                seed_input("Seed of the pictures and noises: keep it to compare LoRAs."),
                io.String.Input(
                    "name", default="checkup", tooltip="Name of the report inside output/checkups; a number is added."
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of one size to measure on instead of class pictures that the model makes.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="page", tooltip="The plots, with the verdict above them."),
                io.String.Output(display_name="verdict", tooltip="What was found, in words."),
                io.Float.Output(display_name="strength", tooltip="The strength to use the LoRA at."),
                io.Float.Output(
                    display_name="weak", tooltip="Of personalization guidance; 1 where the model takes none."
                ),
                io.String.Output(display_name="file", tooltip="The page with everything, to open in a browser."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return WRITTEN.fingerprint(cls.hidden.unique_id)

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._check(**one_each(inputs, ("images",)))

    @classmethod
    def _check(
        cls, model, clip, vae, lora, subject_prompt, class_prompt, resolution, name, images=None, **settings
    ) -> io.NodeOutput:
        from ..anchor_core.adapters.attach import attach_tensors
        from ..anchor_core.adapters.stated import prompts_of
        from ..anchor_core.backends.comfyui.denoiser import ComfyDenoiser
        from ..anchor_core.checks import named
        from ..anchor_core.data.pictures import from_images
        from ..anchor_core.evaluation import checkup_page
        from ..anchor_core.evaluation.checkup import about_file, check_up
        from .plot import figure_image

        lora, place = checked_lora("lora", lora), _place(name)
        prompts = prompts_of(lora.metadata, subject_prompt, class_prompt)
        settings = CheckupSettings(**settings)
        bar = comfy.utils.ProgressBar(1)

        def tick(done: int, of: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, of)

        with ComfyDenoiser(model, clip, vae) as denoiser:

            def attach():
                with named("lora"):
                    return attach_tensors(denoiser, lora, lora.metadata, lora.embedding)

            latents = None if images is None else denoiser.encode_images(from_images(images).stack())
            shape = denoiser.latent_shape(resolution, resolution)
            report = check_up(
                denoiser, attach, lora.metadata, prompts, latents=latents, shape=shape, settings=settings, tick=tick
            )
        report |= about_file(lora.metadata.get("modelspec.title") or name, lora.metadata)
        figure = checkup_page.draw(report)
        with claimed(place) as page:
            checkup_page.save(report, figure, page.with_suffix(".json"), page)
        WRITTEN.add(cls.hidden.unique_id, page)
        verdict, suggested = "\n".join(report["verdict"]["sentences"]), report["suggested"]
        weak = 1.0 if suggested["weak"] is None else suggested["weak"]
        found = (figure_image(figure), verdict, suggested["strength"], weak, str(page))
        return io.NodeOutput(*found, ui={"text": [verdict]})


def _place(name: str) -> Path:
    """`<name>_00001_.html` under output/checkups; ValueError if that leads out of it or cannot be made."""
    root = Path(folder_paths.get_output_directory()) / "checkups"
    place = root / f"{name.strip()}_00001_.html"
    if not name.strip() or not folder_paths.is_within_directory(str(root), str(place)):
        raise ValueError(f"name is {name!r}, but it takes the name of a file inside {root}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"name is {name!r}, but {place.parent} cannot be made ({error.strerror}); take another"
        ) from error
    return place
