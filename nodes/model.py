"""The embedded model."""

import folder_paths
from comfy_api.latest import io

from .types import CATEGORY


class AnchorSandboxModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorSandboxModel",
            display_name="Sandbox Model",
            category=CATEGORY,
            description=(
                "A small text-to-image model that comes with this pack, for trying things out on any computer. "
                "Pictures are 64 x 64; it draws shapes such as stars, hearts and moons."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..anchor_core.sandbox.comfyui import load
        from ..anchor_core.sandbox.model import WEIGHTS

        return io.NodeOutput(*load(WEIGHTS, folder_paths.get_folder_paths("embeddings")))
