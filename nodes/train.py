"""Training an adapter on the model that is on the canvas."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..anchor_core.adapter import LAYERS, AdapterConfig
from ..anchor_core.data import from_images
from ..anchor_core.objectives import OBJECTIVES
from ..anchor_core.trainer import TrainSettings
from .types import CATEGORY, AdapterTensors, ConceptType, HistoryType, LoraModel, LossMap, new_lora_file

logger = logging.getLogger(__name__)

LOG_EVERY = 50
PREVIEW_STEPS, PREVIEW_GUIDANCE, PREVIEW_SIDE = 12, 5.0, 512


class AnchorTrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default, adapter = TrainSettings(), AdapterConfig()
        return io.Schema(
            node_id="AnchorTrainLoRA",
            display_name="Train Anchored LoRA",
            category=CATEGORY,
            description=(
                "Teach the model a subject from a few pictures by a LoRA that is held to what the model knows of the "
                "subject's class. Trains on the loaded model itself and leaves it as it was. The file appears under "
                "output/loras as soon as the training ends; a cancelled training keeps what it has learnt there."
            ),
            search_aliases=["dreambooth", "train lora", "semantic anchoring"],
            inputs=[
                io.Model.Input("model", tooltip="The model to teach; LoRAs on it count as part of it."),
                io.Clip.Input("clip", tooltip="Its text encoder, which is not trained."),
                io.Vae.Input("vae", tooltip="Its autoencoder."),
                io.Image.Input("images", tooltip="3 to 20 pictures of the subject."),
                ConceptType.Input("concept", tooltip="The subject prompt and the class prompt."),
                io.Combo.Input(
                    "objective",
                    options=list(OBJECTIVES),
                    default=default.objective,
                    tooltip="anchor: hold the subject's prediction to the class's. reconstruction: plain DreamBooth. "
                    "prior_preservation: DreamBooth with class pictures. blended_target: the anchor as one target.",
                ),
                io.Float.Input(
                    "w",
                    default=default.w,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Weight of the anchor: 0 learns the pictures alone; more keeps more of the model's own.",
                ),
                io.Int.Input("steps", default=default.steps, min=1, max=100000, tooltip="Training steps."),
                io.Float.Input(
                    "learning_rate",
                    default=default.learning_rate,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    tooltip="Size of a step: about 1e-4 for SD1.5 and 2e-3 for the sandbox. Larger learns faster and "
                    "forgets more; NaN means that it is too large.",
                ),
                io.Int.Input("batch_size", default=default.batch_size, min=1, max=64, tooltip="Pictures in a step."),
                io.Int.Input("rank", default=adapter.rank, min=1, max=512, tooltip="Width of the LoRA: its capacity."),
                io.Combo.Input(
                    "layers", options=list(LAYERS), default=adapter.layers, tooltip="The layers that get a LoRA."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="The same seed trains the same LoRA.",
                ),
                io.String.Input("name", default="anchor", tooltip="Name inside output/loras; a number is added."),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100000,
                    tooltip="Steps between two pictures of the subject prompt in the node; 0 for none.",
                ),
                io.Int.Input(
                    "probe_every",
                    default=default.probe_every,
                    min=0,
                    max=100000,
                    tooltip="Steps between two measurements of the drift for the history; 0 for none.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=default.prior_weight,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="prior_preservation only: weight of the class pictures.",
                ),
                io.Int.Input(
                    "class_count",
                    default=24,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="prior_preservation only: how many class pictures are made if none are connected.",
                ),
                io.Image.Input("class_images", optional=True, tooltip="For prior_preservation: pictures of the class."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the trained LoRA."),
                LoraModel.Output(display_name="lora", tooltip="The LoRA."),
                LossMap.Output(display_name="loss", tooltip="The losses, for Plot Loss Graph."),
                HistoryType.Output(display_name="history", tooltip="Losses, terms and drift, for Drift Report."),
                io.String.Output(display_name="file", tooltip="The LoRA's file."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, images, concept, rank, layers, seed, name, preview_every, probe_every, class_count,
        class_images=None, **options,
    ) -> io.NodeOutput:  # fmt: skip
        from ..anchor_core.adapter_file import adapter_metadata, save_adapter, to_file_keys
        from ..anchor_core.backends.comfyui import ComfyDenoiser, apply_adapter
        from ..anchor_core.trainer import train

        settings = TrainSettings(seed=seed, probe_every=probe_every or 1, **options)
        config, path, pictures = AdapterConfig(rank=rank, layers=layers), new_lora_file(name), from_images(images)
        with ComfyDenoiser(model, clip, vae) as denoiser:
            latents = denoiser.encode_images(pictures.stack())
            class_latents = _class_latents(denoiser, concept, settings, class_images, class_count, latents)
            adapter = denoiser.attach(config, seed)
            probe = _probe(denoiser, latents, concept) if probe_every else None
            watch = _Watch(denoiser, concept, settings, preview_every, latents)
            try:
                history = train(
                    denoiser, adapter, latents, concept, settings, class_latents=class_latents, probe=probe,
                    on_step=watch.on_step, should_stop=comfy.model_management.processing_interrupted,
                )  # fmt: skip
                interrupted = history.cancelled
            except comfy.model_management.InterruptProcessingException:
                interrupted = True  # any layer of ComfyUI's raises it; the adapter is that of the last whole step
            tensors = to_file_keys(adapter, denoiser.file_keys())
            metadata = adapter_metadata(denoiser, concept, settings, watch.made)
        if watch.made:
            save_adapter(path, tensors, metadata)
        if interrupted:
            comfy.model_management.interrupt_current_processing(False)
            raise comfy.model_management.InterruptProcessingException()
        lora = AdapterTensors(tensors, metadata)
        adapted = apply_adapter(model, lora, 1.0)
        return io.NodeOutput(adapted, lora, {"loss": history.losses}, history.to_dict(), str(path))


def _class_latents(denoiser, concept, settings: TrainSettings, class_images, class_count: int, latents):
    """Latents of the class pictures if the objective reads them: of those connected, else made by the model."""
    from ..anchor_core.data import sample_class_latents

    if not settings.make_objective().reads_class_pictures:
        return None
    if class_images is not None:
        return denoiser.encode_images(from_images(class_images).stack())
    return sample_class_latents(denoiser, concept, class_count, tuple(latents.shape[1:]), seed=settings.seed)


def _probe(denoiser, latents, concept):
    from ..anchor_core.drift import DriftProbe

    return DriftProbe(denoiser, latents, concept, timesteps=5, noises=2)


class _Watch:
    """Progress bar and live preview of one training; `made` counts its whole steps."""

    def __init__(self, denoiser, concept, settings: TrainSettings, preview_every: int, latents):
        import torch

        self.denoiser, self.every, self.made = denoiser, preview_every, 0
        self.bar = comfy.utils.ProgressBar(settings.steps)
        if preview_every:
            self.subject, self.negative = denoiser.encode_prompt(concept.subject_prompt), denoiser.encode_prompt("")
            generator = torch.Generator().manual_seed(settings.seed)
            self.noise = torch.randn((1, *latents.shape[1:]), generator=generator)

    def on_step(self, report) -> None:
        if report.step % LOG_EVERY == 1:
            logger.info("training: step %d of %d, loss %.4f", report.step, report.steps, report.loss)
        self.made = report.step
        wanted = self.every and (report.step % self.every == 0 or report.step == report.steps)
        preview = ("JPEG", self._picture(), PREVIEW_SIDE) if wanted else None
        self.bar.update_absolute(report.step, report.steps, preview)

    def _picture(self):
        from PIL import Image

        latents = self.denoiser.sample(
            [self.subject], self.negative, self.noise, steps=PREVIEW_STEPS, guidance=PREVIEW_GUIDANCE
        )
        pixels = self.denoiser.decode_latents(latents)[0].movedim(0, -1)  # (H, W, 3)
        picture = Image.fromarray((pixels * 255).round().byte().cpu().numpy())
        scale = max(1, PREVIEW_SIDE // max(picture.size))
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
