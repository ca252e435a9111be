"""Run under ComfyUI's interpreter: the self test passes where training is right, and tells where it is not.

Usage: check_selftest.py COMFYUI PACK OUTPUT [--paged]. OUTPUT becomes a JSON object: check to what is wrong, or "".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CHECKS = ("check_passes", "check_base_changed", "check_gradient_wrong", "check_half")

if __name__ == "__main__":
    comfyui, pack, output, *options = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import paged_vram

    if options:
        paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy_models as models
    import contract
    import torch

    from anchor_core.backends.comfyui import layers, selftest
    from anchor_core.backends.comfyui.selftest import self_test


def run(*arguments) -> selftest.SelfTest:
    return self_test(models.build(*arguments)[0], resolution=64, batch_size=2, rank=2, steps=1)


def check_passes() -> None:
    """Whatever the weights are stored in; the gradient is that of another model, all of which is in float32."""
    for arguments in (("sd1",), ("flux",), ("sd1", torch.float8_e4m3fn, torch.float32)):
        found = run(*arguments)
        assert found.passed and found.moved == 0, found
        assert list(found.gradients) == ["as it is"] and found.gradients["as it is"].cosine > 0.99999, found
        assert list(found.costs) == ["reconstruction", "anchor"] and str(found).endswith("passed")


def check_half() -> None:
    """In fp16 a scaled loss is tried too, and is what counts."""
    found = run("flux", torch.float16)
    assert list(found.gradients) == ["as it is", "loss scaled"] and found.passed, found


def check_base_changed() -> None:
    """A base model that is another one afterwards."""
    cost = selftest._cost

    def meddling(denoiser, *arguments):
        with torch.inference_mode():
            next(iter(denoiser.network.parameters())).add_(1)
        return cost(denoiser, *arguments)

    selftest._cost = meddling
    try:
        found = run("sd1")
    finally:
        selftest._cost = cost
    assert not found.untouched and not found.passed and "CHANGED" in str(found)


def check_gradient_wrong() -> None:
    """A backward pass with other weights than the forward pass's, as after an eviction that nobody noticed."""
    backward = layers._AskAgain.backward

    def wrong(ctx, gradient):
        given, none = backward(ctx, gradient)
        return given * torch.linspace(0, 2, given.shape[-1]), none

    layers._AskAgain.backward = staticmethod(wrong)
    try:
        found = run("sd1", torch.bfloat16, torch.float32)
    finally:
        layers._AskAgain.backward = backward
    assert found.untouched and not found.passed and str(found).endswith("FAILED"), found


def main() -> None:
    if options:
        paged_vram.start(scale=1024)
        models.build = paged_vram.paged(models.build)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        results = {check: contract.outcome(globals()[check]) for check in CHECKS}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
