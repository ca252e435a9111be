"""Run under ComfyUI's interpreter: training on paged weights (dynamic VRAM) is training on plain ones.

Usage: check_paged.py COMFYUI PACK OUTPUT [--core] [FAMILY ...]. OUTPUT becomes a JSON object: family to check to what
is wrong, or "", and under `clip` the checks on SDXL with its text encoders. With `--core` the checks that take seconds
a family, on the first two kinds of adapters; without it all, on every kind.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

FAMILIES = ("sd1", "sd2_v", "sdxl", "sdxl_v", "sd3", "flux", "chroma", "lumina2", "wan", "qwen_image")
KINDS = {"lora": 2, "dora": 2, "lokr": 2, "loha": 2, "oft": 4, "full": 1, "svdiff": 1}
"""Kinds of adapters by rank; the first two stand for those that do not read weights and those that do."""
FEW = r"\.0\..*att"
"""The attention of the first blocks, in each family's names."""
POOLS = {
    "every_page_evicted": {},
    "room_for_a_third": {"evict": 0.0, "third": True},
    "refused_faults": {"refuse": 0.5},
    "stolen_pins": {"evict": 0.5, "pins": 1 << 14},
}

if __name__ == "__main__":
    comfyui, pack, output, *options = sys.argv[1:]
    core, chosen = "--core" in options, [each for each in options if each != "--core"]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import paged_vram
    from paged_vram import POOL

    paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.model_management
    import comfy.ops
    import comfy_models as models
    import comfy_text_encoders
    import contract
    import torch
    from comfy_training import (
        assert_near,
        checked_up,
        gradients,
        guided_picture,
        picture,
        predict,
        run_training,
        trained,
    )
    from torch import Tensor

    from anchor_core.adapters.attach import attach_tensors
    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.backends.comfyui.apply import apply_adapter
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from anchor_core.drift import DriftProbe
    from anchor_core.training.events import StepMade
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train

    build_plain = models.build


def training(parts, shape, kind: str = "lora", meddle=None, **options) -> dict[str, Tensor]:
    """The losses and the adapter of three steps, with whatever comes between them."""
    with ComfyDenoiser(*parts) as denoiser:
        layers = FEW if kind == "full" else "attention"  # of Chroma's network attention is more than half
        config = AdapterConfig(kind=kind, rank=KINDS[kind], layers=layers, **options)
        adapter = denoiser.attach(config, 0)
        settings = TrainSettings(steps=3, batch_size=2, learning_rate=1e-2, guidance=2.0)
        latents = contract.draw(denoiser, shape, 2)

        def between(event) -> None:
            if meddle is not None and isinstance(event, StepMade) and event.step < settings.steps:
                meddle(denoiser, shape)

        history = train(denoiser, adapter, latents, contract.CONCEPT, settings, tell=between)
        return {"losses": torch.tensor(history.losses), **adapter.state_dict()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def preview(denoiser: ComfyDenoiser, shape) -> None:
    """A picture of the subject as it is trained, its encoding, a prompt's, and a measured probe."""
    subject, null = denoiser.encode_prompts([contract.CONCEPT.subject_prompt, ""])
    latents = denoiser.sample([subject], null, contract.draw(denoiser, shape, 1), steps=2, guidance=2.0)
    denoiser.encode_images(denoiser.decode_latents(latents))
    DriftProbe(denoiser, contract.draw(denoiser, shape, 1), contract.CONCEPT, timesteps=1, noises=1).measure()


@cache
def other_model():
    return models.build("sd3")


def load_paged(denoiser: ComfyDenoiser, shape) -> None:
    """Another paged model is sampled in the middle: it takes every page."""
    other, clip, _ = other_model()
    with torch.inference_mode():
        picture(other, clip, models.latent_shape("sd3"))
    denoiser.model._vbar_get().free_memory(1e32)


def load_plain(denoiser: ComfyDenoiser, shape) -> None:
    """Another model is loaded in the middle for which ComfyUI unloads all others."""
    with torch.inference_mode():
        comfy.model_management.free_memory(1e30, denoiser.device)


@contextmanager
def pool(kind: str, model) -> Iterator[None]:
    """The page pool behaves in one of `POOLS`."""
    usual = {"evict": 1.0, "refuse": 0.0, "pins": 1 << 30, "pages": 10**9}
    third = {"pages": max(model.model_size() // POOL.page // 3, 8)} if kind == "room_for_a_third" else {}
    POOL.set(**usual | POOLS[kind] | third)
    try:
        yield
    finally:
        POOL.set(**usual)


def check_core(name: str, shape) -> None:
    """Losses and adapter however the pool behaves, with a picture or another model in between."""
    plain, paged = build_plain(name), models.build(name)
    picture(paged[0], paged[1], shape)  # pages filled in a prompt before
    wanted = {kind: training(plain, shape, kind) for kind in list(KINDS)[:2]}
    for kind, meddle in zip(POOLS, (preview, load_paged, load_plain, None)):
        with pool(kind, paged[0]):
            assert_same(training(paged, shape, "lora", meddle), wanted["lora"])
    assert_same(training(paged, shape, "dora", load_plain), wanted["dora"])
    assert not paged_vram.pinned_pages()


def check_kinds(name: str, shape) -> None:
    """Losses and adapters of every kind, with pictures in between."""
    plain, paged = build_plain(name), models.build(name)
    for kind in KINDS:
        assert_same(training(paged, shape, kind, preview), training(plain, shape, kind, preview))


def check_pools(name: str, shape) -> None:
    """Gradients however the pool behaves, with checkpointing."""
    plain, paged = build_plain(name), models.build(name)
    with ComfyDenoiser(*plain) as denoiser:
        wanted = gradients(denoiser, contract.make_step(denoiser, shape))
    for kind in POOLS:
        with pool(kind, paged[0]), ComfyDenoiser(*paged) as denoiser:
            assert_near(gradients(denoiser, contract.make_step(denoiser, shape), denoiser.blocks), wanted, 1e-5)


def check_lora_on_model(name: str, shape) -> None:
    """A LoRA on the MODEL is part of what is trained on."""
    plain, paged = build_plain(name), models.build(name)
    tensors, *_ = trained(*plain, shape)
    plain, paged = ((apply_adapter(model, tensors, 0.5)[0], *rest) for model, *rest in (plain, paged))
    for kind in ("lora", "dora"):
        assert_same(training(paged, shape, kind), training(plain, shape, kind))


def check_stored(name: str, shape) -> None:
    """Weights in the file's dtype, cast to the computing one in the page or at each use."""
    for kind, stored in (("lora", torch.bfloat16), ("dora", torch.float8_e4m3fn), ("lora", torch.float8_e5m2)):
        plain, paged = build_plain(name, stored, torch.float32), models.build(name, stored, torch.float32)
        assert_same(training(paged, shape, kind), training(plain, shape, kind))


def check_other_uses(name: str, shape) -> None:
    """A LoRA applied, guided by, measured and checked up, as a product of factors and as a difference of weights."""
    plain, paged = build_plain(name), models.build(name)
    for kind in ("lora", "dora"):
        tensors, *_ = trained(*plain, shape, kind=kind)
        found = []
        for model, clip, vae in (paged, plain):
            applied = predict(apply_adapter(model, tensors, 0.5)[0], clip, vae, shape)
            with ComfyDenoiser(model, clip, vae) as denoiser:
                attach_tensors(denoiser, tensors)
                probe = DriftProbe(denoiser, contract.draw(denoiser, shape, 1), contract.CONCEPT, timesteps=2, noises=1)
                drift = torch.tensor(probe.measure().drift)
            with ComfyDenoiser(model, clip, vae) as denoiser:
                report = checked_up(denoiser, tensors, shape)
            found.append(
                {
                    "applied": applied,
                    "drift": drift,
                    "guided": guided_picture(model, clip, shape, tensors),
                    "checked up": report,
                }
            )
        for key, theirs in found[1].items():
            torch.testing.assert_close(
                found[0][key], theirs, atol=1e-4, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
            )
    assert not paged_vram.pinned_pages()


def check_endings(name: str, shape) -> None:
    """However a training ends: the same weights on the host, the same picture, no page pinned, no memory taken."""
    model, clip, vae = models.build(name)
    tensors, *_ = trained(model, clip, vae, shape)
    endings = (None, RuntimeError, comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError)
    for on in (model,) if core else (model, apply_adapter(model, tensors, 0.5)[0]):
        (values, objects, rest), first = state(on), picture(on, clip, shape)
        own = objects & state(on)[1]  # what ComfyUI does not page it loads anew each time
        assert len(own) > len(values) / 2
        for ending in endings:
            ended = run_training(on, clip, vae, shape, ending)
            assert ended is ending, f"the training ended by {ended} instead of {ending}"
            assert not paged_vram.pinned_pages(), f"after {ending} pages are pinned"
            assert torch.equal(picture(on, clip, shape), first), f"after {ending} the picture is another one"
            found = state(on)
            assert all(torch.equal(values[key], found[0][key]) for key in values), f"after {ending} weights are others"
            assert own <= found[1] and rest == found[2], f"after {ending} the model is another one"
    taken = memory()
    run_training(on, clip, vae, shape, None)
    state(on)
    assert memory() <= taken, f"{memory() - taken} bytes of tensors are left behind"


def state(model) -> tuple:
    """Of a MODEL that ComfyUI has unloaded: what its tensors hold, which these are, and what modules and flags."""
    model.detach()
    network = model.model
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    own = {(name, id(each), each.is_inference(), each.requires_grad) for name, each in tensors.items()}
    modules = [(name, id(each), type(each), "forward" in vars(each)) for name, each in network.named_modules()]
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in network.modules()]
    management = comfy.model_management
    ways = [name for name in ("partially_load", "partially_unload", "detach") if name in vars(model)]
    globals_ = (management.in_training, management.NUM_STREAMS, comfy.ops.cast_bias_weight)
    return values, own, (modules, hooks, ways, globals_)


def memory() -> int:
    """Bytes of every tensor that is alive."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def check_text_encoders() -> None:
    """The CLIP lies in pages too: adapters and vectors of text encoders."""
    build = paged_vram.paged(comfy_text_encoders.sdxl)
    models.build = build_plain  # what `sdxl` calls
    paged, plain = build(), paged_vram.unpaged(comfy_text_encoders.sdxl)()
    for options in ({"text_encoder": True, "kind": "dora"}, {"text_encoder": True, "vectors": 2}):
        ours = training(paged, models.latent_shape("sdxl"), meddle=load_plain, **options)
        assert_same(ours, training(plain, models.latent_shape("sdxl"), **options))
    assert not paged_vram.pinned_pages()
    if not core:
        wrong = {name: text for name, text in comfy_text_encoders.outcomes(*paged).items() if name != "untouched"}
        assert not any(wrong.values()), "\n".join(wrong.values())


CHECKS = (check_core, check_kinds, check_pools, check_lora_on_model, check_stored, check_other_uses, check_endings)
CORE = dict.fromkeys(("sdxl", "flux"), (check_core, check_endings, check_other_uses))


def main() -> None:
    global build_plain
    results: dict[str, dict[str, str]] = {}
    paged_vram.start(scale=1024)
    build_plain = paged_vram.unpaged(build_plain)
    models.build = paged_vram.paged(models.build)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        for name in [each for each in FAMILIES if each in chosen or not chosen]:
            checks = CORE.get(name, (check_core,)) if core else CHECKS
            results[name] = {
                check.__name__: contract.outcome(check, name, models.latent_shape(name)) for check in checks
            }
        if "clip" in chosen or not chosen:
            results["clip"] = {"check_text_encoders": contract.outcome(check_text_encoders)}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
