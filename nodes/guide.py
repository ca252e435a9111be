"""Guidance rules: on a MODEL, for any sampler node, and as a GUIDER."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..anchor_core.guidance import RULES, make_rule
from .types import CATEGORY, LoraModel, checked_lora, chosen_lora, inputs_of, lora_inputs, lora_state


class AnchorGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorGuidance",
            display_name="Anchor Guidance",
            category=CATEGORY,
            description=(
                "The model with a LoRA, guided by a rule, for KSampler and every other sampler; cfg is the rule's "
                "scale. All of a step runs in one batch, whatever the strengths of the LoRA in it. Where the LoRA "
                "adapts the text encoder too, encode the prompts with the CLIP of Apply Adapter."
            ),
            inputs=_inputs(),
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the LoRA and the rule.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_):
        return lora_state(file)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(_guided(**inputs))


class AnchorGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorGuider",
            display_name="Anchor Guider",
            category=CATEGORY,
            description="The same guidance as a guider for SamplerCustomAdvanced.",
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="The subject's prompt, encoded: a photo of a sks dog in the snow."
                ),
                io.Conditioning.Input("negative", tooltip="The empty or negative prompt, encoded."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Scale of the rule: 1 is no guidance; 4 to 8 is usual, more is nearer to the prompt and "
                    "harsher.",
                ),
                *_inputs(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_):
        return lora_state(file)

    @classmethod
    def execute(cls, positive, negative, cfg: float, **inputs: Any) -> io.NodeOutput:
        from ..anchor_core.backends.comfyui.guidance import make_guider

        return io.NodeOutput(make_guider(_guided(**inputs), positive, negative, cfg))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model that the LoRA was trained on, without the LoRA."),
        *lora_inputs(),
        io.DynamicCombo.Input(
            "rule",
            options=[io.DynamicCombo.Option(name, _options(rule)) for name, rule in RULES.items()],
            tooltip="What the sampler is led towards and away from. cfg is ComfyUI's own guidance; personalization "
            "measured best with an anchored LoRA; rules with a class prompt put its surroundings first.",
        ),
        io.Conditioning.Input(
            "class_conditioning",
            optional=True,
            tooltip=(
                "The subject's prompt with the class word alone, for the rules that use it. What it lacks, such as a "
                "ControlNet, it takes from the positive prompt."
            ),
        ),
        LoraModel.Input(
            "early_lora", optional=True, tooltip="An early checkpoint of the training, for autoguidance with early on."
        ),
    ]


def _options(rule: type) -> list[io.Input]:
    inputs = inputs_of(rule, [field.name for field in fields(rule)], optional=True)
    for each in inputs:
        if isinstance(each, io.Float.Input):
            each.min, each.max = 0.0, 1.0
    return inputs


def _guided(
    model, strength: float, file: str, rule: dict | None = None, lora=None, class_conditioning=None, early_lora=None
):
    from ..anchor_core.backends.comfyui.guidance import guide_model

    if rule is None:  # ComfyUI does not ask for it
        raise ValueError(f"rule is missing; choose one of {', '.join(RULES)}")
    options = {name: value for name, value in rule.items() if name != "rule"}
    return guide_model(
        model,
        chosen_lora(file, lora),
        make_rule(rule["rule"], **options),
        strength=strength,
        class_conditioning=class_conditioning,
        early_lora=None if early_lora is None else checked_lora("early_lora", early_lora),
    )
