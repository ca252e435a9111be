"""The nodes, by topic: references, model, train, inspect, apply, adjust."""

from comfy_api.latest import ComfyExtension, io

from .adjust import AnchorAdjustConditioning, AnchorAdjustEmbedding
from .apply import AnchorApplyAdapter, AnchorLoadAdapter, AnchorSaveAdapter
from .inspect import AnchorDriftReport
from .model import AnchorSandboxModel
from .references import AnchorConcept, AnchorLoadReferences
from .train import AnchorTrainLoRA, AnchorTrainOptions

NODES = [
    AnchorSandboxModel,
    AnchorLoadReferences,
    AnchorConcept,
    AnchorTrainLoRA,
    AnchorTrainOptions,
    AnchorDriftReport,
    AnchorApplyAdapter,
    AnchorSaveAdapter,
    AnchorLoadAdapter,
    AnchorAdjustConditioning,
    AnchorAdjustEmbedding,
]


class AnchorExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
