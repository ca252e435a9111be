"""Semantic Anchor for ComfyUI: the entry point. The nodes are imported when ComfyUI asks for them."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import AnchorExtension

    return AnchorExtension()
