"""Checks of the network, its noise process, its pictures, and what an adapter leaves of it."""

from __future__ import annotations

import torch
from torch import Tensor

from anchor_core.denoiser import Denoiser
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

from .steps import CONCEPT, LAYERS, LEVELS, Shape, attached, draw, times


def check_adapter_off_is_untouched(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """With the adapter off, and after it is taken off, predictions are exactly those from before it came."""
    conditions = [denoiser.encode_prompt(CONCEPT.subject_prompt)] * len(LEVELS)

    def predict() -> Tensor:
        with torch.no_grad():
            return denoiser.predict(draw(denoiser, shape), times(denoiser), conditions)

    untouched = predict()
    assert untouched.dtype == torch.float32, f"predict gives {untouched.dtype} instead of float32"
    assert untouched.shape == (len(LEVELS), *shape), f"predict gives {tuple(untouched.shape)} for latents of {shape}"
    assert torch.isfinite(untouched).all(), "predict gives values that are not finite"
    with attached(denoiser, layers):
        assert not torch.allclose(predict(), untouched, atol=1e-4), "the adapter has no effect"
        with denoiser.adapter_disabled():
            assert torch.equal(predict(), untouched), "with the adapter off, the network is not the untouched one"
        assert not torch.equal(predict(), untouched), "the adapter is not on again after it was off"
    assert torch.equal(predict(), untouched), "after the adapter is taken off, the network is not the untouched one"


def _coefficients(denoiser: Denoiser, shape: Shape) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, (B, 1, 1, 1), as `add_noise` has them."""
    one = torch.ones((len(LEVELS), *shape), device=denoiser.device)
    alpha = denoiser.add_noise(one, torch.zeros_like(one), times(denoiser))
    sigma = denoiser.add_noise(torch.zeros_like(one), one, times(denoiser))
    return alpha.double().mean((1, 2, 3), keepdim=True), sigma.double().mean((1, 2, 3), keepdim=True)


def check_noise_process(denoiser: Denoiser, shape: Shape) -> None:
    """`add_noise`, `target`, `snr` and `epsilon_scale` say the same of alpha_t and sigma_t."""
    latents, noise, timesteps = draw(denoiser, shape, seed=1), draw(denoiser, shape, seed=2), times(denoiser)
    alpha, sigma = _coefficients(denoiser, shape)
    noisy, target = denoiser.add_noise(latents, noise, timesteps), denoiser.target(latents, noise, timesteps)
    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(noisy.double(), alpha * latents + sigma * noise, **near)

    norm = {"flow": alpha + sigma}.get(denoiser.prediction_type, alpha.square() + sigma.square())
    torch.testing.assert_close(norm, torch.ones_like(norm), **near, msg="alpha_t and sigma_t do not fit together")
    recovered = {
        "epsilon": lambda: (noisy - sigma * target) / alpha,
        "v_prediction": lambda: alpha * noisy - sigma * target,
        "flow": lambda: noisy - sigma * target,
    }[denoiser.prediction_type]()
    torch.testing.assert_close(recovered, latents.double(), **near, msg="z_0 is not what z_t and the target say")

    snr = denoiser.snr(timesteps).double()
    torch.testing.assert_close(snr, (alpha / sigma).square().flatten(), **near, msg="snr is not alpha^2 / sigma^2")
    assert (snr.diff() < 0).all(), f"snr is {snr.tolist()} at ascending levels, but it should fall"

    # Another z_0 and noise that meet in the same z_t: what differs is the prediction alone.
    other = draw(denoiser, shape, seed=4).double()
    other_noise = (noisy - alpha * other) / sigma
    difference = denoiser.target(other, other_noise, timesteps).double() - target
    scale = denoiser.epsilon_scale(timesteps).double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        scale * difference, other_noise - noise, **near, msg="epsilon_scale does not turn native differences to epsilon"
    )


def check_rows_are_independent(denoiser: Denoiser, shape: Shape) -> None:
    """A batch of different prompts and timesteps is its rows one at a time."""
    prompts = (CONCEPT.subject_prompt, "", "a cat in the snow, in the snow, in the snow")
    conditions = [denoiser.encode_prompt(prompt) for prompt in prompts]
    noisy, timesteps = draw(denoiser, shape), times(denoiser)
    with torch.no_grad():
        together = denoiser.predict(noisy, timesteps, conditions)
        swapped = denoiser.predict(noisy, timesteps, conditions[1:] + conditions[:1])
        for row, condition in enumerate(conditions):
            alone = denoiser.predict(noisy[row : row + 1], timesteps[row : row + 1], [condition])
            off = (alone[0] - together[row]).abs().max().item()
            assert off < 1e-4, f"row {row} alone differs from itself in a batch by {off:.2g}"
    assert not torch.allclose(together, swapped, atol=1e-5), "predictions do not depend on the prompt"


def _networks(denoiser: Denoiser) -> dict[str, torch.nn.Module]:
    return {"": denoiser.network, **getattr(denoiser, "text_encoders", {})}


def _anatomy(network: torch.nn.Module) -> dict[str, tuple]:
    parts: dict[str, tuple] = {name: (type(m), id(m), m.training) for name, m in network.named_modules()}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        parts[f"{name} (tensor)"] = (type(tensor), tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape)
    return parts


def check_detach_restores(denoiser: Denoiser, shape: Shape, layers: str = LAYERS, **options) -> None:
    """After a step of training, detach leaves modules, parameters, flags and values as they were."""
    networks = _networks(denoiser)
    before = {key: _anatomy(network) for key, network in networks.items()}
    values = {
        key: {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        for key, network in networks.items()
    }
    random_state = torch.get_rng_state()
    with attached(denoiser, layers, **options) as adapter:
        train(denoiser, adapter, draw(denoiser, shape, 1), CONCEPT, TrainSettings(steps=1, batch_size=1))
    assert torch.equal(torch.get_rng_state(), random_state), "the global random state was used"
    for key, network in _networks(denoiser).items():
        after = _anatomy(network)
        changed = [name for name in {**before[key], **after} if before[key].get(name) != after.get(name)]
        assert not changed, f"detach left {key or 'the network'} changed: {', '.join(changed[:3])}"
        state = network.state_dict()
        moved = [name for name, value in values[key].items() if not torch.equal(state[name], value)]
        assert not moved, f"training changed the weights of {key or 'the network'}: {', '.join(moved[:3])}"
    denoiser.detach()  # a second call does nothing


def check_file_keys(denoiser: Denoiser, shape: Shape, layers: str = LAYERS, **options) -> None:
    """Every adapted module has one file key of its own, the same with and without an adapter."""
    before = denoiser.file_keys()
    with attached(denoiser, layers, **options) as adapter:
        after = denoiser.file_keys()
        missing = [name for name in adapter.module_names if name not in after]
        assert not missing, f"{len(missing)} adapted modules have no file key: {', '.join(missing[:3])}"
        keys = [after[name] for name in adapter.module_names]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        assert not twice, f"file keys belong to several modules: {', '.join(twice[:3])}"
    assert before == after == denoiser.file_keys(), "file keys change when an adapter is attached"


def check_blocks(denoiser: Denoiser, shape: Shape) -> None:
    """`blocks` are modules of the network, none within another, that a prediction runs once each."""
    blocks = denoiser.blocks
    assert blocks, "the network has no blocks"
    own = set(map(id, denoiser.network.modules()))
    assert all(id(block) in own for block in blocks), "a block is no module of the network"
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    assert not any(id(block) in inner for block in blocks), "a block lies within another"
    runs: list[int] = []
    hooks = [block.register_forward_hook(lambda module, *_: runs.append(id(module))) for block in blocks]
    try:
        with torch.no_grad():
            denoiser.predict(draw(denoiser, shape, 1), times(denoiser, (0.5,)), [denoiser.encode_prompt("a dog")])
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(runs) == sorted(map(id, blocks)), f"{len(blocks)} blocks were run {len(runs)} times"


def check_pictures(denoiser: Denoiser, shape: Shape) -> None:
    """Pictures of latents are (B, 3, H, W) in [0, 1], and their latents have the latents' shape, the same each time."""
    pictures = denoiser.decode_latents(draw(denoiser, shape, 2))
    assert pictures.ndim == 4 and pictures.shape[:2] == (2, 3), f"decode_latents gives {tuple(pictures.shape)}"
    assert 0 <= pictures.min() and pictures.max() <= 1, "decode_latents gives values outside of [0, 1]"
    latents = denoiser.encode_images(pictures)
    assert latents.shape == (2, *shape), f"encode_images gives {tuple(latents.shape)} instead of {(2, *shape)}"
    assert torch.equal(latents, denoiser.encode_images(pictures)), "encode_images gives something else each time"


def check_sampling(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """Samples are repeatable, follow the prompt and the adapter, and take no graph."""
    conditions = [denoiser.encode_prompt(prompt) for prompt in (CONCEPT.class_prompt, "a cat in the snow")]
    negative, noise = denoiser.encode_prompt(""), draw(denoiser, shape, 2)

    def sample(conditions=conditions) -> Tensor:
        return denoiser.sample(conditions, negative, noise, steps=2, guidance=2.0)

    untouched = sample()
    assert untouched.shape == noise.shape and torch.isfinite(untouched).all() and not untouched.requires_grad
    assert torch.equal(untouched, sample()), "two samples of one noise differ"
    assert not torch.allclose(untouched, sample(conditions[::-1]), atol=1e-5), "samples do not follow the prompt"
    with attached(denoiser, layers):
        assert not torch.allclose(untouched, sample(), atol=1e-5), "samples do not follow the adapter"
        with denoiser.adapter_disabled():
            assert torch.equal(untouched, sample()), "with the adapter off, samples are not the untouched network's"
