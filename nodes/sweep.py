"""One value varied, as a grid to look at and choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..anchor_core.training.purposes import MANUAL, PURPOSES
from .compare import CONNECTED, SANDBOX
from .presets import chosen_options, said, settings_of
from .train import new_files, pictures_of
from .types import (
    CATEGORY,
    AdapterTensors,
    ConceptType,
    LoraModel,
    OptionsType,
    ReferencesType,
    checked_lora,
    one_each,
    seed_input,
)

STRENGTH, W, STEPS = "strength", "w", "steps"
NO_JUDGE = "[none]"


class AnchorSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorSweep",
            display_name="Sweep",
            category=CATEGORY,
            description=(
                "One prompt from the same noise at several strengths of a LoRA, or after trainings of several w or "
                "lengths, side by side with their scores. Click a picture to take its value."
            ),
            search_aliases=["xy plot", "grid", "compare strengths"],
            is_input_list=True,  # for lists of pictures
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its autoencoder."),
                ConceptType.Input("concept", tooltip="The subject prompt and the class prompt."),
                io.Combo.Input(
                    "sweep",
                    options=[STRENGTH, W, STEPS],
                    default=STRENGTH,
                    tooltip="What is varied. strength: of the connected LoRA, in a minute. w: a training for each "
                    "value. steps: one training, looked at after so many steps.",
                ),
                io.String.Input(
                    "values",
                    default="0, 0.5, 0.75, 1",
                    tooltip="Numbers with commas between: 0, 0.5, 1 for w; 50, 100, 150 for steps.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What is drawn, with the subject's words: a photo of a sks dog in the snow. A new place "
                    "shows whether prompts are heeded. Empty for the subject prompt itself.",
                ),
                io.Int.Input(
                    "count",
                    default=2,
                    min=1,
                    max=8,
                    tooltip="Pictures of each value, each from a noise of its own; one alone may be chance.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Side of the pictures: 512 for SD1.5, 1024 for SDXL and later, 64 for the sandbox.",
                ),
                seed_input("Seed of the noises, and of the trainings."),
                io.Int.Input(
                    "sampling_steps", default=25, min=1, max=200, advanced=True, tooltip="Steps of a picture."
                ),
                io.Float.Input(
                    "guidance", default=5.0, min=0.0, max=100.0, step=0.5, advanced=True, tooltip="Scale (cfg)."
                ),
                io.Combo.Input(
                    "judge",
                    options=[NO_JUDGE, CONNECTED, SANDBOX],
                    default=NO_JUDGE,
                    tooltip="Scores under each picture, which take references: the connected CLIP and DINO, or the "
                    "judge of the sandbox for its own pictures.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[each for each in PURPOSES if each != MANUAL],
                    default=PURPOSES[0],
                    tooltip="w and steps: how to train, as on the training node.",
                ),
                io.String.Input(
                    "name",
                    default="sweep",
                    advanced=True,
                    tooltip="w and steps: name of the LoRAs inside output/loras; a number is added.",
                ),
                LoraModel.Input("lora", optional=True, tooltip="strength: the LoRA."),
                io.Image.Input("images", optional=True, tooltip="Pictures of the subject, to train on and judge by."),
                ReferencesType.Input(
                    "references", optional=True, tooltip="In place of images: with captions, masks and sizes."
                ),
                OptionsType.Input("options", optional=True, tooltip="w and steps: from Train Options."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="A CLIP of Load CLIP Vision (CLIP-I)."),
                io.ClipVision.Input("dino_vision", optional=True, tooltip="A DINOv2 or DINOv3 of Load CLIP Vision."),
            ],
            has_intermediate_output=True,
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures with their scores."),
                io.Image.Output(display_name="pictures", tooltip="The pictures alone, by value, as one batch."),
                io.String.Output(display_name="table", tooltip="The mean scores of each value, as markdown."),
                io.Float.Output(display_name="best", tooltip="The value of the first place; without scores the last."),
                LoraModel.Output(display_name="lora", tooltip="The LoRA of that value."),
            ],
        )

    @classmethod
    def validate_inputs(cls, values=None):
        from ..anchor_core.evaluation.sweep import parse_values

        try:
            return not values or values[0] is None or parse_values(values[0]) is not None
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._sweep(**one_each(inputs, ("images",)))

    @classmethod
    def _sweep(
        cls, concept, sweep, values, prompt, judge, images=None, references=None, clip_vision=None, dino_vision=None,
        **how,
    ) -> io.NodeOutput:  # fmt: skip
        import torch

        from ..anchor_core.evaluation.sweep import best, grid, markdown, parse_values, score, to_dict
        from .compare import _encoders
        from .plot import figure_image

        wanted = parse_values(values)
        prompt = prompt.strip() or concept.subject_prompt
        class_prompt = concept.class_of(prompt, "prompt")  # and a prompt that does not name the subject is refused
        connected = images is not None or references is not None
        if not connected and (sweep != STRENGTH or judge != NO_JUDGE):
            raise ValueError(f"references are not connected, which {sweep} or the judge reads; connect pictures")
        pictures = pictures_of(images, None, references, False) if connected else None
        encoders = None if judge == NO_JUDGE else _encoders(judge, judge, clip_vision, dino_vision)
        make = _by_strength if sweep == STRENGTH else _by_training
        columns, loras = make(sweep, wanted, concept, prompt, pictures, **how)
        if encoders is not None:
            score(columns, encoders, pictures.pixels, class_prompt)
        first = best(columns)
        chosen = len(columns) - 1 if first is None else first
        batch = torch.stack([each for column in columns for each in column.pictures]).movedim(1, -1)
        shown = ui.PreviewImage(batch, cls=cls).as_dict()["images"]
        told = {"anchor_sweep": [to_dict(columns, sweep)], "anchor_pictures": shown}
        image = figure_image(grid(columns, sweep))
        return io.NodeOutput(
            image, batch, markdown(columns, sweep), float(columns[chosen].label), loras[chosen], ui=told
        )


def _by_strength(sweep, values, concept, prompt, pictures, *, model, clip, vae, lora=None, **how: Any):
    from ..anchor_core.adapters.attach import attach_tensors
    from ..anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from ..anchor_core.checks import named
    from ..anchor_core.evaluation.sweep import Column

    if lora is None:
        raise ValueError("lora is not connected, whose strength is varied; connect one, or sweep w")
    lora = checked_lora("lora", lora)
    bar, columns = comfy.utils.ProgressBar(len(values)), []
    with ComfyDenoiser(model, clip, vae) as denoiser:
        with named("lora"):
            adapter = attach_tensors(denoiser, lora, lora.metadata, lora.embedding)
        for value in values:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with adapter.scaled(value):
                columns.append(Column(f"{value:g}", _drawn(denoiser, prompt, how)))
            bar.update(1)
    return columns, [lora] * len(columns)


def _by_training(sweep, values, concept, prompt, pictures, *, model, clip, vae, options=None, **how: Any):
    """The same material for every training; `steps` is one training that is looked at as it goes."""
    from ..anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from ..anchor_core.data.prepare import ClassPictures, prepare
    from ..anchor_core.training.bank import GB, Bank
    from ..anchor_core.training.methods import check_combination
    from ..anchor_core.training.precision import resolve
    from ..anchor_core.training.run import fit

    options, seed = dict(options or {}), how["seed"]
    chosen = chosen_options(how["preset"], model, len(pictures.pixels), options)
    if sweep == STEPS:
        if any(value < 1 or value != int(value) for value in values):
            raise ValueError(f"values is {values}, but a sweep of steps takes whole numbers of at least 1")
        chosen["steps"] = int(values[-1])
    else:
        options.pop("lambda", None)  # another way to say w
    base = {"seed": seed, "preset": said(how["preset"], model, chosen)}
    _, settings, config, data = settings_of(base, options, chosen)
    trainings = [replace(settings, w=value) for value in values] if sweep == W else [settings]
    check_combination(settings, config, [(concept.subject_prompt, concept.class_prompt)], data.caption_dropout)
    classes, material = ClassPictures(folder=Path(folder_paths.get_temp_directory()) / "anchor_class_pictures"), None
    with ComfyDenoiser(model, clip, vae) as denoiser:
        bank = Bank(denoiser, limit=GB * settings.bank) if len(trainings) > 1 else None  # every w has the same anchors
        watch = _Watch(denoiser, prompt, how, sum(each.steps for each in trainings))
        for each in trainings:
            each = resolve(each, denoiser)
            each.check_model(denoiser.prediction_type)
            denoiser.attach(config, seed=seed)
            material = material or prepare(
                denoiser, pictures, concept, probe=None, seed=seed, shuffle=data.shuffle, flip=data.flip,
                class_pictures=classes if each.make_objective().reads_class_pictures else None,
                caption_dropout=data.caption_dropout,
            )  # fmt: skip
            watch.begin(f"{each.w:g}" if sweep == W else None, values if sweep == STEPS else ())
            files = new_files(how["name"], config)
            outcome = fit(denoiser, material, each, files=files, tell=watch, orders=watch.orders, bank=bank)
            denoiser.detach()
            if outcome.how == "cancelled":
                comfy.model_management.interrupt_current_processing(False)
                raise comfy.model_management.InterruptProcessingException()
    return watch.columns, watch.loras


class _Watch:
    """A listener of the trainings: the progress bar, and a column for each LoRA that is saved."""

    def __init__(self, denoiser, prompt: str, how: dict[str, Any], steps: int):
        self.denoiser, self.prompt, self.how = denoiser, prompt, how
        self.bar, self.made, self.columns, self.loras = comfy.utils.ProgressBar(steps), 0, [], []

    def begin(self, label: str | None, at) -> None:
        """A training begins, which is looked at after the steps `at` and at its end."""
        from ..anchor_core.training.orders import Orders

        self.label, self.at = label, at
        self.orders = Orders(comfy.model_management.processing_interrupted)

    def __call__(self, event) -> None:
        from ..anchor_core.evaluation.sweep import Column
        from ..anchor_core.training.saving import Trained

        if event.event == "step":
            self.made += 1
            self.bar.update_absolute(self.made)
            if event.step in self.at and event.step < event.steps:
                self.orders.save_now()
        elif event.event == "saved":
            trained = Trained.read(event.files)
            self.loras.append(AdapterTensors(trained.tensors, trained.metadata, trained.vectors))
            self.columns.append(Column(self.label or str(event.step), _drawn(self.denoiser, self.prompt, self.how)))


def _drawn(denoiser, prompt: str, how: Mapping[str, Any]) -> list:
    from ..anchor_core.evaluation.sweep import draw, noises

    noise = noises(denoiser.latent_shape(how["size"], how["size"]), how["count"], how["seed"])
    return draw(denoiser, prompt, noise, steps=how["sampling_steps"], guidance=how["guidance"])
