"""What every denoiser must do, for any backend: `check(denoiser, shape)` raises AssertionError if it does not.

`denoiser` has no adapter when a check begins, and none when it ends; `shape` is (C, h, w) of its latents. `layers` is
an `AdapterConfig.layers`. Nothing but torch and anchor_core is imported, so that the checks also run inside ComfyUI.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anchor_core import objectives
from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.concept import Concept
from anchor_core.denoiser import Denoiser, Step, Texts
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
LEVELS = (0.1, 0.5, 0.9)
LAYERS = "all_linear"

Shape = tuple[int, int, int]


def outcome(check: Callable, *arguments, **options) -> str:
    """What is wrong, or "": for a script under another interpreter, whose checks a test reads one by one."""
    try:
        check(*arguments, **options)
    except Exception:  # what is wrong is what this is asked for
        return traceback.format_exc()[-3000:]
    return ""


def draw(denoiser: Denoiser, shape: Shape, rows: int = len(LEVELS), seed: int = 0) -> Tensor:
    """Unit noise (rows, C, h, w) on the denoiser's device."""
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed)).to(denoiser.device)


def times(denoiser: Denoiser, levels: tuple[float, ...] = LEVELS) -> Tensor:
    return denoiser.timesteps(torch.tensor(levels, dtype=torch.float64)).to(denoiser.device)


def make_step(denoiser: Denoiser, shape: Shape) -> Step:
    """A training step on fixed latents, noise and timesteps."""
    rows = len(LEVELS)
    subject = [denoiser.encode_prompt(CONCEPT.subject_prompt)] * rows
    class_ = [denoiser.encode_prompt(CONCEPT.class_prompt)] * rows
    latents, noise = draw(denoiser, shape, seed=1), draw(denoiser, shape, seed=2)
    conditions = {prompt: denoiser.encode_prompt(prompt) for prompt in (CONCEPT.class_prompt, "")}
    texts = Texts(
        [CONCEPT.class_prompt] * rows, lambda prompts: [conditions[p] for p in prompts], CONCEPT.subject_prompt
    )
    return Step(denoiser, latents, noise, times(denoiser), subject, class_, texts=texts)


def stir(adapter: Adapter, size: float = 0.2) -> None:
    """Give every adapter parameter a seeded value, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@contextmanager
def attached(denoiser: Denoiser, layers: str = LAYERS, **options) -> Iterator[Adapter]:
    """A stirred adapter of rank 2, taken off at the end."""
    adapter = denoiser.attach(AdapterConfig(rank=2, layers=layers, **options), seed=1)
    try:
        stir(adapter)
        yield adapter
    finally:
        denoiser.detach()


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


def _gradients(denoiser: Denoiser, shape: Shape, adapter: Adapter, objective, **options) -> tuple[float, list[Tensor]]:
    loss = sum(objective(make_step(denoiser, shape), **options).values())
    return loss.item(), list(torch.autograd.grad(loss, adapter.parameters(), materialize_grads=True))


def check_zero_weight_is_reconstruction(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """Eq. 5 at w = 0 has the loss and the gradient of Eq. 1, exactly."""
    with attached(denoiser, layers) as adapter:
        loss, gradients = _gradients(denoiser, shape, adapter, objectives.semantic_anchoring, w=0.0)
        plain_loss, plain = _gradients(denoiser, shape, adapter, objectives.reconstruction)
    assert loss == plain_loss, f"the loss at w = 0 is {loss}, but reconstruction's is {plain_loss}"
    assert all(map(torch.equal, gradients, plain)), "the gradient at w = 0 is not reconstruction's"


def check_anchor_gradient_is_blended(denoiser: Denoiser, shape: Shape, layers: str = LAYERS, w: float = 0.7) -> None:
    """The gradient of Eq. 5 is 1 + w times that of the blended target (Eq. 4)."""
    with attached(denoiser, layers) as adapter:
        _, anchored = _gradients(denoiser, shape, adapter, objectives.semantic_anchoring, w=w)
        _, blended = _gradients(denoiser, shape, adapter, objectives.blended_target, w=w)
    anchored, blended = (torch.cat([part.flatten().double() for part in parts]) for parts in (anchored, blended))
    off = ((anchored - (1 + w) * blended).norm() / anchored.norm()).item()
    assert anchored.norm() > 0, "the gradient of Eq. 5 is 0"
    assert off < 1e-3, f"the gradient of Eq. 5 is off 1 + w times the blended target's by {off:.2g} of its norm"


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


def check_prompts_ignore_the_adapter(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """A prompt encoded while an adapter is attached is the pretrained encoder's."""
    noisy, timesteps = draw(denoiser, shape, 1), times(denoiser, (0.5,))

    def predict(condition) -> Tensor:
        with torch.no_grad(), denoiser.adapter_disabled():
            return denoiser.predict(noisy, timesteps, [condition])

    before = predict(denoiser.encode_prompt(CONCEPT.class_prompt))
    with attached(denoiser, layers):
        assert torch.equal(predict(denoiser.encode_prompt(CONCEPT.class_prompt)), before), "the adapter alters prompts"


def _owners(adapter: Adapter) -> list[str]:
    """The module of each of `adapter.parameters()`."""
    return [name for name in adapter.module_names for p in adapter.layer(name).parameters() if p.requires_grad]


def check_text_encoder_adapter(denoiser: Denoiser, shape: Shape, layers: str = LAYERS, **options) -> None:
    """`adapted=True` goes through the text encoder's adapter with a graph; a plain prompt is the pretrained one's."""
    pooled = denoiser.encode_pooled([CONCEPT.class_prompt, ""])
    noisy, timesteps = draw(denoiser, shape, 1), times(denoiser, (0.5,))
    with torch.no_grad():
        before = denoiser.predict(noisy, timesteps, [denoiser.encode_prompt(CONCEPT.class_prompt)])
    with attached(denoiser, layers, text_encoder=True, **options) as adapter:
        keys = denoiser.file_keys()
        text = [name for name in adapter.module_names if ":" in name]
        prefixes = {name.partition(":")[0] for name in text}
        assert prefixes == set(denoiser.text_encoders), f"adapted are {prefixes} of {set(denoiser.text_encoders)}"
        assert all("text_model" in keys[name] or "text_projection" in keys[name] for name in text), (
            f"files name the text encoder's modules like {keys[text[0]]}, without text_model"
        )
        plain = [denoiser.encode_prompt(CONCEPT.class_prompt)]
        through = [denoiser.encode_prompt(CONCEPT.class_prompt, adapted=True)]
        with denoiser.adapter_disabled():
            with torch.no_grad():
                assert torch.equal(denoiser.predict(noisy, timesteps, plain), before), (
                    "a plain prompt is not the pretrained encoder's"
                )
            adapted = denoiser.predict(noisy, timesteps, through)
        assert not torch.allclose(adapted, before, atol=1e-5), "the text encoder's adapter has no effect"
        gradients = torch.autograd.grad(adapted.square().mean(), adapter.parameters(), materialize_grads=True)
        assert any(gradient.any() for gradient in gradients), "no gradient reaches the text encoder's adapter"

        again = denoiser.encode_pooled([CONCEPT.class_prompt, ""])
        assert torch.equal(again, pooled) and not again.requires_grad, "the adapter alters the pretrained pooled output"
        lengths = pooled.square().sum(dim=-1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, len(prefixes)), msg="a CLIP's pooled is not of 1")
        moved = denoiser.encode_pooled([CONCEPT.class_prompt, ""], adapted=True)
        assert not torch.allclose(moved, pooled, atol=1e-5), "the adapter has no effect on the pooled output"
        direction = torch.linspace(-1, 1, moved.shape[1], device=moved.device)
        gradients = torch.autograd.grad(moved[0] @ direction, adapter.parameters(), materialize_grads=True)
        reached = {name for name, gradient in zip(_owners(adapter), gradients) if gradient.any()}
        assert {name.partition(":")[0] for name in reached} == prefixes, f"pooled's gradient reaches {sorted(reached)}"


def check_objectives(denoiser: Denoiser, shape: Shape) -> None:
    """Every objective trains, or refuses the model before its first step."""
    latents = draw(denoiser, shape, 2, seed=5)
    text = bool(getattr(denoiser, "text_encoders", {}))
    for name in objectives.OBJECTIVES:
        needs_text, flow = name == "class_diffusion", denoiser.prediction_type == "flow"
        config = AdapterConfig(rank=2, layers="attention", text_encoder=needs_text and text)
        adapter = denoiser.attach(config, seed=1)
        before = adapter.state_dict()
        try:
            settings = TrainSettings(objective=name, steps=2, batch_size=2, learning_rate=1e-2)
            history = train(denoiser, adapter, latents, CONCEPT, settings, class_latents=latents.flip(0))
            refused = ""
        except ValueError as error:
            refused = str(error)
        finally:
            after = adapter.state_dict()
            denoiser.detach()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        if (name == "sude" and flow) or (needs_text and not text):
            assert refused.startswith(f"objective is {name!r}") and not moved, f"{name} is not refused: {refused}"
        else:
            assert not refused and len(history.losses) == 2 and moved, f"{name} does not train: {refused}"
            assert not needs_text or any(":" in key for key in moved), f"{name} does not reach the text encoder"


def check_token_vectors(denoiser: Denoiser, shape: Shape, vectors: int = 2) -> None:
    """Trained vectors count where a prompt has the token and is adapted; every other prompt is the pretrained one's."""
    noisy, timesteps = draw(denoiser, shape, 1), times(denoiser, (0.5,))

    def predict(prompt: str, adapted: bool = False) -> Tensor:
        return denoiser.predict(noisy, timesteps, [denoiser.encode_prompt(prompt, adapted)])

    with torch.no_grad():
        before = [predict(prompt) for prompt in (CONCEPT.subject_prompt, CONCEPT.class_prompt)]
    adapter = denoiser.attach(AdapterConfig(kind="none", vectors=vectors), seed=1)
    try:
        starts = list(adapter.tokens.vectors.values())
        assert set(adapter.tokens.vectors) == set(denoiser.text_encoders)
        assert all(len(part) == vectors and torch.equal(part[0], part[-1]) for part in starts)
        if vectors == 1 and denoiser.prediction_type != "flow":  # T5 reads the prompt without the token
            with torch.no_grad():
                torch.testing.assert_close(predict(CONCEPT.subject_prompt, adapted=True), before[0], atol=1e-5, rtol=0)
        stir(adapter)
        with torch.no_grad():
            plain = [predict(prompt) for prompt in (CONCEPT.subject_prompt, CONCEPT.class_prompt)]
            assert all(map(torch.equal, plain, before)), "a plain prompt is not the pretrained encoder's"
            assert torch.equal(predict(CONCEPT.class_prompt, adapted=True), before[1]), "prompts without it change"
        adapted = predict(CONCEPT.subject_prompt, adapted=True)
        assert not torch.allclose(adapted, before[0], atol=1e-5), "the vectors have no effect"
        gradients = torch.autograd.grad(adapted.square().mean(), adapter.parameters())
        assert all(row.any() for gradient in gradients for row in gradient), "a vector gets no gradient"
    finally:
        denoiser.detach()


def check_memorises(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """Thirty steps of training on one picture bring down its loss at fixed noise and timesteps."""
    latents = draw(denoiser, shape, 1, seed=5)
    settings = TrainSettings(objective="reconstruction", steps=30, learning_rate=4e-2, batch_size=3)
    adapter = denoiser.attach(AdapterConfig(rank=4, layers=layers), seed=1)
    try:
        step = make_step(denoiser, shape)
        step.latents = latents.expand(len(LEVELS), -1, -1, -1)

        def loss() -> float:
            with torch.no_grad():
                now = denoiser.predict(step.noisy, step.timesteps, step.subject_conditions)
                return objectives.mse(now, step.target).item()

        before = loss()
        history = train(denoiser, adapter, latents, CONCEPT, settings)
        after = loss()
    finally:
        denoiser.detach()
    assert len(history.losses) == settings.steps
    assert after < 0.97 * before, f"training on one picture took its loss from {before:.4g} to {after:.4g} only"


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


CHECKS = (
    check_adapter_off_is_untouched,
    check_zero_weight_is_reconstruction,
    check_anchor_gradient_is_blended,
    check_noise_process,
    check_rows_are_independent,
    check_prompts_ignore_the_adapter,
    check_objectives,
    check_memorises,
    check_detach_restores,
    check_file_keys,
    check_blocks,
    check_pictures,
    check_sampling,
)
"""Every check that needs nothing but `(denoiser, shape)`; `check_text_encoder_adapter` needs text encoders."""
