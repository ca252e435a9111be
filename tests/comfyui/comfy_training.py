"""What scripts under ComfyUI's interpreter do with a MODEL: predict, train, take gradients, make a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import comfy.sample
import comfy.samplers
import contract
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import to_file_keys
from anchor_core.adapters.stated import prompts_of
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser
from anchor_core.backends.comfyui.guidance import guide_model, make_guider
from anchor_core.evaluation.checkup import check_up
from anchor_core.evaluation.settings import CheckupSettings
from anchor_core.guidance import make_rule
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train


@contextmanager
def checkpointed(blocks) -> Iterator[None]:
    """As the trainer does it: the blocks keep their inputs only."""
    for block in blocks:

        def run(*arguments, forward=block.forward, **options):
            if not torch.is_grad_enabled():
                return forward(*arguments, **options)
            return checkpoint(forward, *arguments, use_reentrant=False, **options)

        block.forward = run
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def loss_of(denoiser: ComfyDenoiser, step) -> Tensor:
    prediction = denoiser.predict(step.noisy, step.timesteps, step.subject_conditions)
    return (prediction.double() - step.target).square().mean()


def gradients(denoiser: ComfyDenoiser, step, blocks=(), **options) -> list[Tensor]:
    """Of a stirred adapter in every linear layer."""
    with contract.attached(denoiser, **options) as adapter, checkpointed(blocks):
        return list(torch.autograd.grad(loss_of(denoiser, step), adapter.parameters(), materialize_grads=True))


def assert_near(ours: list[Tensor], theirs: list[Tensor], limit: float = 1e-4) -> None:
    ours, theirs = (torch.cat([part.flatten().double() for part in parts]) for parts in (ours, theirs))
    off = ((ours - theirs).norm() / theirs.norm()).item()
    assert theirs.norm() > 0 and off < limit, f"gradients are off by {off:.2g} of their norm"


def predict(model, clip, vae, shape) -> Tensor:
    with ComfyDenoiser(model, clip, vae) as denoiser, torch.no_grad():
        condition = denoiser.encode_prompt("a photo of a dog")
        return denoiser.predict(contract.draw(denoiser, shape), contract.times(denoiser), [condition] * 3)


def checked_up(denoiser: ComfyDenoiser, tensors: dict[str, Tensor], shape) -> Tensor:
    """Every number of an adapter's check-up."""
    prompts = prompts_of({}, contract.CONCEPT.subject_prompt, contract.CONCEPT.class_prompt)
    attach, settings = partial(attach_tensors, denoiser, tensors), CheckupSettings(timesteps=2)
    latents = contract.draw(denoiser, shape, 1)
    return torch.tensor(
        list(_numbers(check_up(denoiser, attach, {}, prompts, latents=latents, shape=shape, settings=settings)))
    )


def _numbers(report) -> Iterator[float]:
    if isinstance(report, (int, float)):
        yield float(report)
    elif isinstance(report, (dict, list)):
        for each in report.values() if isinstance(report, dict) else report:
            yield from _numbers(each)


def trained(model, clip, vae, shape, **options) -> tuple[dict[str, Tensor], Tensor, int]:
    """An adapter's tensors as its file has them, what it predicts, and its number of layers."""
    with (
        ComfyDenoiser(model, clip, vae) as denoiser,
        contract.attached(denoiser, **options) as adapter,
        torch.no_grad(),
    ):
        condition = denoiser.encode_prompt("a photo of a dog")
        prediction = denoiser.predict(contract.draw(denoiser, shape), contract.times(denoiser), [condition] * 3)
        return to_file_keys(adapter, denoiser.file_keys()), prediction, len(adapter.module_names)


def picture(model, clip, shape) -> Tensor:
    """By ComfyUI alone, as a KSampler node makes it."""
    (positive,), (negative,) = (clip.encode_from_tokens_scheduled(prompt) for prompt in ("a dog in the snow", ""))
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(8))
    noise = noise.unsqueeze(2) if model.model.latent_format.latent_dimensions == 3 else noise
    return comfy.sample.sample(
        model,
        noise,
        2,
        3.0,
        "euler",
        "simple",
        [positive],
        [negative],
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def run_training(
    model, clip, vae, shape, ending: type[BaseException] | None, layers: str = "all_linear"
) -> type[BaseException] | None:
    """Two steps; an error comes up inside the network, in the second one's backward pass."""
    try:
        with ComfyDenoiser(model, clip, vae) as denoiser:
            adapter = denoiser.attach(AdapterConfig(rank=2, layers=layers), 0)
            calls = []

            def stop(gradient: Tensor) -> None:
                calls.append(gradient)
                if ending is not None and len(calls) == 2:
                    raise ending("in the middle of a step")

            adapter.parameters()[-1].register_hook(stop)
            train(denoiser, adapter, contract.draw(denoiser, shape, 1), contract.CONCEPT, TrainSettings(steps=2))
    except BaseException as error:
        if type(error) is not ending:
            raise
        return type(error)
    return None


def guided_picture(model, clip, shape, tensors, kind: str = "autoguidance") -> Tensor:
    """Two steps by a rule with strengths by row, of a LoRA's tensors."""
    conds = [clip.encode_from_tokens_scheduled(prompt) for prompt in ("a photo of a dog", "a dog in the snow", "")]
    guided = guide_model(model, tensors, make_rule(kind), class_conditioning=conds[0])
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(8))
    noise = noise.unsqueeze(2) if model.model.latent_format.latent_dimensions == 3 else noise
    guider, sigmas = make_guider(guided, *conds[1:], 3.0), torch.tensor([1.0, 0.6, 0.0])
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), sigmas, disable_pbar=True, seed=0
    )
