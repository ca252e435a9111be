"""What other nodes put on a MODEL, as training runs it: patches that write in place, wrappers that are for sampling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

logger = logging.getLogger(__name__)

ATTENTION = "optimized_attention_override"
AROUND_A_SAMPLING = (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREPARE_SAMPLING)
IN_A_STEP = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def training_options(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """The transformer_options of a prediction in training, without what a sampler says of its step.

    Wrappers of a node that also wraps whole samplings are left out, since what they keep from step to step (EasyCache)
    is made there; so is `torch.compile`, which would compile for minutes in the middle of the training.
    """
    options = model.model_options["transformer_options"].copy()
    wrappers = comfy.patcher_extension.copy_nested_dicts(options.get("wrappers", {}))
    comfy.patcher_extension.merge_nested_dicts(wrappers, model.wrappers, copy_dict1=False)
    for_sampling = {COMPILE_KEY, *(key for kind in AROUND_A_SAMPLING for key in wrappers.get(kind, {}))} - {None}
    for kind in IN_A_STEP:
        wrappers[kind] = {key: each for key, each in wrappers.get(kind, {}).items() if key not in for_sampling}
    patches = {name: [_guarded(each) for each in patches] for name, patches in options.get("patches", {}).items()}
    return options | {"wrappers": wrappers, "patches": patches, ATTENTION: _with_gradient}


def _with_gradient(_: Callable, *arguments, **options) -> Tensor:
    """Attention by PyTorch, whatever ComfyUI was started with and whatever a node chose: Sage's, Comfy Kitchen's and,
    as it is called there, Flash's have no gradient, and that which passes by the attention would be a wrong one;
    ComfyUI's own for want of others keeps the square of the tokens for it."""
    return attention_pytorch(*arguments, **options)


def tell_of_attention(model: comfy.model_patcher.ModelPatcher) -> None:
    """Says in the log that training leaves out what a node put in the place of the attention."""
    override = model.model_options["transformer_options"].get(ATTENTION)
    if override is not None:
        logger.info("attention: PyTorch's in training; %s is left to sampling, as it may have no gradient",
                    origin(override))  # fmt: skip


def without_compiling(model: comfy.model_patcher.ModelPatcher) -> Callable[[], None]:
    """Take `torch.compile` off a MODEL, for the pictures in between too; gives what puts it back."""
    wrappers = model.wrappers.get(WrappersMP.APPLY_MODEL, {})
    compiled = wrappers.pop(COMPILE_KEY, None)

    def put_back() -> None:
        if compiled is not None:
            wrappers[COMPILE_KEY] = compiled

    return put_back


@contextmanager
def told_apart(model: comfy.model_patcher.ModelPatcher) -> Iterator[None]:
    """What goes wrong in a network that other nodes have patched is said to be theirs, by their names."""
    try:
        yield
    except (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError):
        raise
    except Exception as error:
        options = model.model_options["transformer_options"]
        found = [each for patches in options.get("patches", {}).values() for each in patches]
        found += [each for patches in options.get("patches_replace", {}).values() for each in patches.values()]
        found += [each for wrappers in model.wrappers.values() for many in wrappers.values() for each in many]
        if not found:
            raise
        names = ", ".join(dict.fromkeys(map(origin, found)))
        raise ValueError(
            f"this model does not run with what other nodes have put on it, {names} ({error}); connect the model from "
            "before them"
        ) from error


def origin(function: Any) -> str:
    """Where a function, method or callable object comes from, for a message: a node's class is in its name."""
    function = function[-1] if isinstance(function, tuple) else function
    named = function if hasattr(function, "__qualname__") else type(function)
    module = named.__module__.replace("\\", "/").rpartition("/")[2]  # of a node pack it is a path
    return f"{module}.{named.__qualname__.replace('.<locals>', '')}"


def _guarded(patch: Any) -> Any:
    """A patch that may write into its arguments and into what it computed, while autograd keeps copies of them."""
    if isinstance(patch, tuple):  # of a class of modules and what is done there
        return tuple(_guarded(each) if callable(each) and not isinstance(each, type) else each for each in patch)
    if not callable(patch):
        return patch

    def guarded(*arguments, **options):
        if not torch.is_grad_enabled():
            return patch(*arguments, **options)
        arguments = [_copied(each) for each in arguments]
        options = {name: _copied(each) for name, each in options.items()}
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda tensor: tensor):
            return patch(*arguments, **options)

    return guarded


def _copied(argument: Any) -> Any:
    """With copies of what has a gradient, in a dictionary's entries too; dictionaries of options stay what they are."""
    if isinstance(argument, Tensor):
        return argument.clone() if argument.requires_grad else argument
    if isinstance(argument, dict) and any(isinstance(each, Tensor) for each in argument.values()):
        return {name: _copied(each) if isinstance(each, Tensor) else each for name, each in argument.items()}
    return argument
