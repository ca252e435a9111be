"""Semantic Anchor for ComfyUI: the entry point. The nodes are imported when ComfyUI asks for them."""


async def comfy_entrypoint():
    from .nodes import AnchorExtension

    return AnchorExtension()
