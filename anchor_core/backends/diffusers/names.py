"""Names of modules: a network's own, and a UNet's in the original (LDM) layout, which adapter files of SDXL use."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ...adapters.layers import is_leaf

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_names(unet: nn.Module) -> dict[str, str]:
    """diffusers' name to the original name, for every module that both layouts have."""
    names = dict(_ENDS)
    for part, place in _parts(unet):
        for name, _ in unet.get_submodule(part).named_modules(prefix=part):
            head, *rest = name[len(part) + 1 :].split(".")
            names[name] = ".".join([place, _RESNET.get(head, head), *rest]) if head else place
    return names


def _parts(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Each resnet, attention, downsampling and upsampling of diffusers' blocks with its place in the original's.

    The original has no blocks of blocks: it counts each resnet with its attention, and each downsampling, as one; an
    upsampling belongs to the resnet before it.
    """
    place = 1  # after conv_in
    for index, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield from _layer(block, f"down_blocks.{index}", layer, f"input_blocks.{place}")
            place += 1
        if getattr(block, "downsamplers", None):
            yield f"down_blocks.{index}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    place = 0
    for index, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            yield from _layer(block, f"up_blocks.{index}", layer, f"output_blocks.{place}")
            place += 1
        if getattr(block, "upsamplers", None):
            after = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{index}.upsamplers.0.conv", f"output_blocks.{place - 1}.{after}.conv"


def _layer(block: nn.Module, name: str, layer: int, place: str) -> Iterator[tuple[str, str]]:
    yield f"{name}.resnets.{layer}", f"{place}.0"
    if getattr(block, "attentions", None):
        yield f"{name}.attentions.{layer}", f"{place}.1"


def own_layers(network: nn.Module, adapted: Collection[str] = (), prefix: str = "") -> list[str]:
    """Names of a network's own modules that hold parameters alone, in its order, whether adapted or not.

    Args:
        adapted: names of adapted modules, of this network those that begin with `prefix`.
    """
    own = {name.removeprefix(prefix) for name in adapted if name.startswith(prefix)}
    names, wrapper = [], None
    for name, module in network.named_modules():
        if name in own:
            names.append(name)
            wrapper = f"{name}."
        # The parts of an adapted module are not the network's own.
        elif is_leaf(module) and not (wrapper and name.startswith(wrapper)):
            names.append(name)
    return names
