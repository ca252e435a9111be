"""Whether training is right on this machine."""

from __future__ import annotations

from comfy_api.latest import io

from .types import CATEGORY


class AnchorSelfTest(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorSelfTest",
            display_name="Training Self Test",
            category=CATEGORY,
            description=(
                "Trains a LoRA on this model for a few steps on noise, keeps nothing, and says whether its gradient is "
                "that of the model in float32, whether the model is as it was, and what a step costs in time and "
                "memory. For a new card, driver or kind of model."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to try."),
                io.Int.Input(
                    "resolution", default=512, min=64, max=2048, step=64, tooltip="Edge of the pictures, in pixels."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=16, tooltip="Pictures in a step."),
                io.Int.Input("rank", default=8, min=1, max=128, tooltip="Rank of the LoRA."),
                io.Int.Input("steps", default=5, min=1, max=100, tooltip="Steps that are timed, after a first one."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A line for each finding; the last says passed or not.")
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model, resolution, batch_size, rank, steps) -> io.NodeOutput:
        from ..anchor_core.backends.comfyui.selftest import self_test

        report = str(self_test(model, resolution, batch_size, rank, steps))
        return io.NodeOutput(report, ui={"text": [report]})
