"""The nodes, by topic: references, model, train, inspect, checkup, compare, apply, adjust, guide, self test."""

from comfy_api.latest import ComfyExtension, io

from . import routes
from .adjust import AnchorAdjustConditioning, AnchorAdjustEmbedding
from .apply import AnchorApplyAdapter, AnchorLoadAdapter, AnchorSaveAdapter
from .checkup import AnchorCheckup
from .compare import AnchorCompare
from .door import checked
from .guide import AnchorGuidance, AnchorGuider
from .inspect import AnchorDriftReport
from .model import AnchorSandboxModel
from .references import AnchorConcept, AnchorImageReferences, AnchorLoadReferences
from .selftest import AnchorSelfTest
from .sweep import AnchorSweep
from .train import AnchorTrainLoRA, AnchorTrainOptions

NODES = [
    AnchorSandboxModel,
    AnchorLoadReferences,
    AnchorImageReferences,
    AnchorConcept,
    AnchorTrainLoRA,
    AnchorTrainOptions,
    AnchorDriftReport,
    AnchorCheckup,
    AnchorCompare,
    AnchorApplyAdapter,
    AnchorSaveAdapter,
    AnchorLoadAdapter,
    AnchorAdjustConditioning,
    AnchorAdjustEmbedding,
    AnchorGuidance,
    AnchorGuider,
    AnchorSelfTest,
    AnchorSweep,
]
for _node in NODES:
    checked(_node)


class AnchorExtension(ComfyExtension):
    async def on_load(self) -> None:
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
