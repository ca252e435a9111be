"""Measuring what an adapter has changed."""

from __future__ import annotations

from comfy_api.latest import io

from .types import CATEGORY, ConceptType, HistoryType, LoraModel, checked_lora, one_each, seed_input


class AnchorDriftReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorDriftReport",
            display_name="Drift Report",
            category=CATEGORY,
            description=(
                "How far a LoRA has moved the subject's prediction from the model's own prediction for the class "
                "(drift), and how well it predicts the pictures (reconstruction), by timestep. For any LoRA."
            ),
            is_input_list=True,  # for lists of pictures
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its autoencoder."),
                io.Image.Input(
                    "images",
                    tooltip="Pictures of one size to measure on: the references show what was learnt, pictures of the "
                    "class the harm.",
                ),
                ConceptType.Input(
                    "concept", tooltip="The prompts to measure with: those that the LoRA was trained with."
                ),
                LoraModel.Input("lora", tooltip="The LoRA to measure, of Train Anchored LoRA or Load Adapter."),
                io.Int.Input(
                    "timesteps",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="How many noise levels, evenly over the schedule; more is a finer curve and takes longer.",
                ),
                io.Int.Input(
                    "noises",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Noises for each picture and level; more is less chance and takes longer.",
                ),
                seed_input("Seed of the noises: keep it to compare LoRAs."),
                HistoryType.Input(
                    "history",
                    optional=True,
                    tooltip="A training's history, to plot its loss and drift over the steps as well.",
                ),
                io.Int.Input(
                    "class_pictures",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="How many pictures of the class the model makes, for the other two readings of the paper's "
                    "Fig. 2: the subject's prediction against the class's on a picture of its own. 0 for none.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Drift and error by timestep, and over the training."),
                io.String.Output(display_name="numbers", tooltip="The same in numbers."),
            ],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._measure(**one_each(inputs, ("images",)))

    @classmethod
    def _measure(
        cls, model, clip, vae, images, concept, lora, timesteps, noises, seed, history=None, class_pictures=0
    ) -> io.NodeOutput:
        from ..anchor_core.adapters.attach import attach_tensors
        from ..anchor_core.backends.comfyui.denoiser import ComfyDenoiser
        from ..anchor_core.data.pictures import from_images
        from ..anchor_core.data.prepare import sample_class_latents
        from ..anchor_core.drift import DriftProbe
        from .plot import drift_plot

        checked_lora("lora", lora)
        pictures = from_images(images).stack()
        with ComfyDenoiser(model, clip, vae) as denoiser:
            denoiser.cancellable = True
            latents = denoiser.encode_images(pictures)
            how = {"timesteps": timesteps, "noises": noises, "seed": seed}
            if class_pictures:
                shape = tuple(latents.shape[1:])
                how["class_latents"] = sample_class_latents(denoiser, concept, class_pictures, shape, seed=seed)
            probe = DriftProbe(denoiser, latents, concept, **how)
            before = probe.measure()
            try:
                attach_tensors(denoiser, lora, getattr(lora, "metadata", None), getattr(lora, "embedding", None))
            except ValueError as error:
                raise ValueError(f"lora: {error}") from error
            after = probe.measure()
        numbers = _numbers(before, after)
        return io.NodeOutput(drift_plot(before, after, history), numbers, ui={"text": [numbers]})


def _numbers(before, after) -> str:
    rows = [
        ("drift", before.drift, after.drift),
        ("drift (RMS)", before.drift_rms, after.drift_rms),
        ("reconstruction", before.reconstruction, after.reconstruction),
    ]
    if after.paired is not None:
        rows.append(("B, same noise", before.paired, after.paired))
        rows.append(("C, other noise", before.independent, after.independent))
    for (timestep, drift, _), (_, drift_after, _) in zip(before.by_timestep, after.by_timestep, strict=True):
        rows.append((f"drift, t = {timestep:4.0f}", drift, drift_after))
    # Narrow enough for a preview node.
    return "\n".join(
        [f"{'LoRA':15}{'without':>9}{'with':>9}", *(f"{name:15}{one:9.4f}{two:9.4f}" for name, one, two in rows)]
    )
