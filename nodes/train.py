"""Training an adapter on the model that is on the canvas."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..anchor_core.adapters.config import AdapterConfig
from ..anchor_core.adapters.kinds import NO_LAYERS
from ..anchor_core.adapters.layers import LAYERS
from ..anchor_core.checks import check_count
from ..anchor_core.data.pictures import from_images
from ..anchor_core.training.settings import DataSettings, TrainSettings
from . import runs
from .checkpoints import CHECKPOINTS, NEW_TRAINING, checkpoint_names, open_checkpoints
from .presets import MANUAL, chosen_options, preset_input, said, settings_of, w_input
from .references import MASK_TOOLTIP, invert_masks_input
from .types import (
    CATEGORY,
    AdapterTensors,
    ConceptType,
    HistoryRecord,
    HistoryType,
    LoraModel,
    LossMap,
    OptionsType,
    ReferencesType,
    TrainOptions,
    embedding_word,
    inputs_of,
    new_embedding_file,
    new_lora_file,
    one_each,
    seed_input,
)
from .written import WRITTEN

logger = logging.getLogger(__name__)

LOG_EVERY = 50
TRAIN_OPTIONS = (
    "anchor optimizer weight_decay beta1 beta2 grad_clip accumulation schedule warmup ema min_snr timestep_sampling "
    "timestep_mean timestep_std timestep_shift timestep_min timestep_max precision gradient_checkpointing "
    "stop_on_drift keep guidance checkpoint_every token_learning_rate"
).split()
ADAPTER_OPTIONS = "kind dropout text_encoder vectors token initial detach_start".split()
PREVIEW_SIDE = 512
LISTS = ("images", "masks", "class_images")
"""Inputs that may be lists of ComfyUI: one training on all of them."""


class AnchorTrainOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorTrainOptions",
            display_name="Train Options",
            category=CATEGORY,
            description="What else a training can be told: optimizer, noise levels, precision, when to stop.",
            inputs=[
                *inputs_of(AdapterConfig, ADAPTER_OPTIONS),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    tooltip="The update counts alpha / rank: half of the rank is a gentler LoRA. 0 for the rank.",
                ),
                io.String.Input(
                    "layer_pattern",
                    default="",
                    tooltip="A regular expression over the names of layers, in place of the node's choice: attn2 "
                    "trains what reads the prompt alone.",
                ),
                *inputs_of(TrainSettings, TRAIN_OPTIONS),
                *inputs_of(DataSettings, ("flip", "shuffle", "caption_dropout")),
                io.Combo.Input(
                    "resume",
                    options=[NEW_TRAINING, *checkpoint_names()],
                    default=NEW_TRAINING,
                    tooltip="Go on from the checkpoints of a training that was broken off, under output/"
                    f"{CHECKPOINTS}; everything else must be as it was. Needs checkpoint_every in that training.",
                ),
                *inputs_of(TrainSettings, ("sude_weight", "semantic_weight"), optional=True),
                io.Float.Input(
                    "lambda",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    optional=True,
                    tooltip="The subject's share in place of the node's w, which is then (1 - lambda) / lambda: 1 is w "
                    "= 0, 2/3 is w = 0.5. 0 for w.",
                ),
                *inputs_of(TrainSettings, ("micro_batch", "memory", "draws", "bank"), optional=True),
                *inputs_of(DataSettings, ("templates", "resizes"), optional=True),
                *inputs_of(AdapterConfig, ("coft",), optional=True),
                *inputs_of(TrainSettings, ("norm_learning_rate",), optional=True),
            ],
            outputs=[OptionsType.Output(display_name="options", tooltip="For Train Anchored LoRA.")],
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        return io.NodeOutput(TrainOptions(options))


class AnchorTrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
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
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to teach; it stays as it is. LoRAs on it count as part of it."
                ),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its autoencoder."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="3 to 20 pictures of the subject, a batch or a list. With captions: references.",
                ),
                ConceptType.Input("concept", tooltip="The subject prompt and the class prompt."),
                *inputs_of(
                    TrainSettings,
                    ("objective",),
                    advanced=True,
                    objective="anchor: hold the subject's prediction to the class's; begin here. reconstruction: plain "
                    "DreamBooth. prior_preservation: DreamBooth with class pictures. blended_target: the anchor as one "
                    "target. sude: away from the empty prompt, towards the class. class_diffusion: hold the subject's "
                    "text to the class's, which takes an adapter of the text encoder",
                ),
                w_input(),
                *inputs_of(TrainSettings, ("steps",)),
                *inputs_of(TrainSettings, ("learning_rate", "batch_size"), advanced=True),
                *inputs_of(AdapterConfig, ("rank",), advanced=True),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=AdapterConfig.layers,
                    advanced=True,
                    tooltip="What of the network learns: attention for most; attention_feed_forward or all_linear for "
                    "finer detail and larger files; cross_attention_kv only what is read from the prompt.",
                ),
                seed_input("The same seed trains the same LoRA; another one is another try."),
                io.String.Input(
                    "name",
                    default="anchor",
                    tooltip="Name of the file inside output/loras, such as my dog; a number is added.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100000,
                    tooltip="Steps between two pictures of the subject prompt in the node, to see when the subject is "
                    "there; each costs a sampling. 0 for none.",
                ),
                io.Int.Input(
                    "probe_every",
                    default=TrainSettings.probe_every,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="Steps between two measurements of the drift, for the history, keep best and "
                    "stop_on_drift. 0 for none.",
                ),
                *inputs_of(TrainSettings, ("prior_weight",), advanced=True),
                io.Int.Input(
                    "class_count",
                    default=24,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="prior_preservation and sude: how many class pictures the model makes if none are "
                    "connected; more keep the class better, and take longer to make.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="For prior_preservation and sude: pictures of the class, in place of those that the model "
                    "makes.",
                ),
                ReferencesType.Input(
                    "references",
                    optional=True,
                    tooltip="In place of images: pictures of several sizes, with captions and masks.",
                ),
                io.Mask.Input("masks", optional=True, tooltip=f"For images: {MASK_TOOLTIP}"),
                OptionsType.Input(
                    "options",
                    optional=True,
                    tooltip="From Train Options: optimizer, precision, memory, when to stop. Without it the defaults.",
                ),
                invert_masks_input(advanced=True),
                *inputs_of(TrainSettings, ("class_weight",), optional=True, advanced=True),
                preset_input(),
            ],
            # Not unique_id: with it the same training under another id would be trained again.
            hidden=[io.Hidden.extra_pnginfo],
            has_intermediate_output=True,  # so that a cached node tells its run again
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the trained LoRA."),
                LoraModel.Output(display_name="lora", tooltip="The LoRA."),
                LossMap.Output(display_name="loss", tooltip="The losses, for Plot Loss Graph."),
                HistoryType.Output(display_name="history", tooltip="Losses, terms and drift, for Drift Report."),
                io.String.Output(display_name="file", tooltip="The LoRA's file."),
                io.Clip.Output(display_name="clip", tooltip="The CLIP, with the LoRA's part for it if it was trained."),
                io.String.Output(
                    display_name="embedding",
                    tooltip="What to write in prompts in the place of the subject's token: embedding:name. Without "
                    "vectors, the token itself.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return WRITTEN.fingerprint(_training(one_each(inputs, LISTS)))

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return cls._train(**one_each(inputs, LISTS))

    @classmethod
    def _train(
        cls, model, clip, vae, concept, rank, layers, seed, name, preview_every, probe_every, class_count, images=None,
        class_images=None, references=None, masks=None, options=None, invert_masks=False, preset=MANUAL, **basic,
    ) -> io.NodeOutput:  # fmt: skip
        from ..anchor_core.backends.comfyui.apply import apply_adapter
        from ..anchor_core.backends.comfyui.denoiser import ComfyDenoiser
        from ..anchor_core.training.orders import Orders
        from ..anchor_core.training.run import run

        pictures = pictures_of(images, masks, references, invert_masks)
        chosen = chosen_options(preset, model, len(pictures.pixels), options or {})
        told = {**basic, "rank": rank, "layers": layers, "seed": seed, "preset": said(preset, model, chosen)}
        resume, settings, config, data = settings_of(told | {"probe_every": probe_every or 1}, options or {}, chosen)
        classes = _class_pictures(settings, class_images, class_count)
        files = new_files(name, config)
        checkpoints = open_checkpoints(resume, files.adapter, settings.checkpoint_every)
        orders = Orders(comfy.model_management.processing_interrupted)
        resumable = checkpoints and checkpoints.folder.name
        with runs.begin(
            files.adapter, settings, orders, _workflow(cls.hidden.extra_pnginfo), resumable, chosen
        ) as going:
            going.listeners.append(_Watch(settings.steps))
            with ComfyDenoiser(model, clip, vae) as denoiser:
                outcome = run(
                    denoiser, pictures, concept, settings, config, data, files=files, class_pictures=classes,
                    probe={"timesteps": 5, "noises": 2} if probe_every else None, tell=going.tell, orders=orders,
                    checkpoints=checkpoints, picture_every=preview_every, bank=_bank(denoiser, settings),
                )  # fmt: skip
            if outcome.how == "cancelled":
                comfy.model_management.interrupt_current_processing(False)
                raise comfy.model_management.InterruptProcessingException()
            if outcome.trained is None:
                raise ValueError("the training was stopped before its first step, so there is no LoRA; run it again")
        lora = AdapterTensors(outcome.trained.tensors, outcome.trained.metadata, outcome.trained.vectors)
        if config.kind != NO_LAYERS:
            model, clip = apply_adapter(model, lora, 1.0, clip)
        word = embedding_word(outcome.files[-1]) if config.vectors else config.token
        told |= {"name": name, "preset": preset}
        WRITTEN.add(_training(told), *outcome.files)
        history, path = outcome.history, str(outcome.files[0])
        record = HistoryRecord(history.to_dict())
        ui = {"anchor_run": [going.id]}
        return io.NodeOutput(model, lora, {"loss": history.losses}, record, path, clip, word, ui=ui)


def _workflow(extra) -> str | None:
    """The id of the graph in a page that was queued; a prompt through the API has none."""
    graph = extra.get("workflow") if isinstance(extra, dict) else None
    return graph.get("id") if isinstance(graph, dict) and isinstance(graph.get("id"), str) else None


def _training(inputs) -> str:
    """What tells the node's trainings apart by their widgets, for `WRITTEN`: an id would tell equal ones apart too."""
    told = "name seed objective w steps learning_rate batch_size rank layers prior_weight class_weight preset".split()
    values = ({"preset": MANUAL, **inputs}.get(each) for each in told)
    return repr([float(each) if isinstance(each, int) else each for each in values])  # JSON's 1 is our 1.0


def pictures_of(images, masks, references, invert_masks: bool):
    if (images is None) == (references is None):
        raise ValueError("images and references are both or neither connected; connect one of the two")
    if references is not None and masks is not None:
        raise ValueError("masks is connected beside references, which has its own; connect masks with images alone")
    return from_images(images, masks=masks, invert_masks=invert_masks) if references is None else references


def _class_pictures(settings: TrainSettings, class_images, class_count: int):
    """Those connected, if the objective reads them, else how the model makes them."""
    from ..anchor_core.data.prepare import ClassPictures

    if class_images is not None and settings.make_objective().reads_class_pictures:
        return ClassPictures(pixels=from_images(class_images, name="class_images").stack())
    # ComfyUI empties its temporary folder when it starts.
    folder = Path(folder_paths.get_temp_directory()) / "anchor_class_pictures"
    return ClassPictures(check_count("class_count", class_count), folder=folder)


def _bank(denoiser, settings: TrainSettings):
    """Of the anchors of fixed draws, which serve the next training of the same pictures too."""
    from ..anchor_core.training.bank import GB, Bank

    folder = Path(folder_paths.get_temp_directory()) / "anchor_bank"  # emptied when ComfyUI starts
    return Bank(denoiser, folder, GB * settings.bank) if settings.draws else None


def new_files(name: str, config: AdapterConfig):
    """New files for what `config` trains: a LoRA's, an embedding's, or one of each."""
    from ..anchor_core.training.saving import Files

    embedding = new_embedding_file(name) if config.vectors else None
    adapter = embedding if config.kind == NO_LAYERS else new_lora_file(name)
    return Files(adapter, embedding or adapter, new=True)


class _Watch:
    """A listener: the node's progress bar with its live picture, and the log."""

    def __init__(self, steps: int):
        self.bar, self.steps, self.step = comfy.utils.ProgressBar(steps), steps, 0

    def __call__(self, event) -> None:
        if event.event == "step":
            self.step, self.steps = event.step, event.steps
            if event.step % LOG_EVERY == 1:
                logger.info("training: step %d of %d, loss %.4f", event.step, event.steps, event.loss)
            self.bar.update_absolute(event.step, event.steps)
        elif event.event == "picture":
            from ..anchor_core.training.record import thumbnail

            picture = thumbnail(event.pixels, PREVIEW_SIDE)
            self.bar.update_absolute(self.step, self.steps, ("JPEG", picture, PREVIEW_SIDE))
