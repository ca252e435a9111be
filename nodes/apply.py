"""Adapters: apply, save, load."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..anchor_core.writing import claimed
from .types import (
    CATEGORY,
    AdapterTensors,
    ConceptType,
    LoraModel,
    checked_lora,
    chosen_lora,
    embedding_file,
    lora_file,
    lora_inputs,
    lora_state,
    new_embedding_file,
    new_lora_file,
)
from .written import WRITTEN

NO_EMBEDDING = "[none]"


class AnchorApplyAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorApplyAdapter",
            display_name="Apply Adapter",
            category=CATEGORY,
            description="The model with a LoRA, connected or from a file. A LoRA for another model is refused.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained on."),
                *lora_inputs(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Needed for a LoRA that adapts the text encoder too; encode the prompts with the CLIP that "
                    "comes out.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA."),
                io.Clip.Output(display_name="clip", tooltip="The connected CLIP with the LoRA's part for it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_):
        return lora_state(file)

    @classmethod
    def execute(cls, model, strength: float, file: str, lora=None, clip=None) -> io.NodeOutput:
        from ..anchor_core.backends.comfyui.apply import apply_adapter
        from ..anchor_core.checks import named

        tensors = chosen_lora(file, lora)
        with named(getattr(tensors, "file", "") or "lora"):
            return io.NodeOutput(*apply_adapter(model, tensors, strength, clip))


class AnchorSaveAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorSaveAdapter",
            display_name="Save Adapter",
            category=CATEGORY,
            description=(
                "Write a LoRA under output/loras, where LoraLoader finds it, with its prompts and settings; or an "
                "embedding into the embeddings folder, where prompts find it."
            ),
            is_output_node=True,
            inputs=[
                LoraModel.Input("lora", tooltip="The LoRA or embedding to write."),
                io.String.Input(
                    "name", default="anchor", tooltip="Name inside output/loras, such as my dog; a number is added."
                ),
                ConceptType.Input(
                    "concept",
                    optional=True,
                    tooltip="The prompts to write into it, for a LoRA that has none: other nodes then know its words.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Where it was written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return WRITTEN.fingerprint(cls.hidden.unique_id)

    @classmethod
    def execute(cls, lora, name: str, concept=None) -> io.NodeOutput:
        from ..anchor_core.adapters.file import save_adapter
        from ..anchor_core.adapters.tokens import is_embedding

        metadata = dict(getattr(checked_lora("lora", lora), "metadata", {}))
        if concept is not None:
            metadata |= {"anchor.subject_prompt": concept.subject_prompt, "anchor.class_prompt": concept.class_prompt}
        with claimed((new_embedding_file if is_embedding(lora) else new_lora_file)(name)) as path:
            save_adapter(path, lora, metadata)
        WRITTEN.add(cls.hidden.unique_id, path)
        return io.NodeOutput(str(path), ui={"text": [str(path)]})


class AnchorLoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorLoadAdapter",
            display_name="Load Adapter",
            category=CATEGORY,
            description="A LoRA file with the prompts that it was trained with.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file of the loras folders. A new one shows after pressing R.",
                ),
                io.Combo.Input(
                    "embedding",
                    options=[NO_EMBEDDING, *folder_paths.get_filename_list("embeddings")],
                    default=NO_EMBEDDING,
                    optional=True,
                    tooltip="The embedding that was trained together with the LoRA, which Drift Report needs too.",
                ),
            ],
            outputs=[
                LoraModel.Output(display_name="lora", tooltip="The LoRA."),
                io.String.Output(display_name="subject_prompt", tooltip="Empty if the file does not say."),
                io.String.Output(display_name="class_prompt", tooltip="Empty if the file does not say."),
                io.String.Output(display_name="settings", tooltip="Everything else that the file says, a line each."),
                io.Float.Output(display_name="guidance", tooltip="The scale (cfg) that the file recommends, or 5."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, embedding: str = NO_EMBEDDING):
        return [path.stat().st_mtime_ns for path in _files(file, embedding)]

    @classmethod
    def execute(cls, file: str, embedding: str = NO_EMBEDDING) -> io.NodeOutput:
        from ..anchor_core.adapters.file import load_adapter
        from ..anchor_core.adapters.metadata import recommended_guidance, stated_prompt, told

        (tensors, metadata), *beside = (load_adapter(path) for path in _files(file, embedding))
        prompts = [stated_prompt(metadata, name) or "" for name in ("subject", "class")]
        lora = AdapterTensors(tensors, metadata, beside[0][0] if beside else None)
        return io.NodeOutput(lora, *prompts, told(metadata), recommended_guidance(metadata))


def _files(file: str, embedding: str) -> list[Path]:
    """That of the LoRA, and that of its embedding if one is chosen."""
    return [lora_file(file)] + ([] if embedding == NO_EMBEDDING else [embedding_file(embedding, "embedding")])
