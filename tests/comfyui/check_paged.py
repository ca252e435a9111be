"""Run under ComfyUI's interpreter: training on paged weights (dynamic VRAM) is training on plain ones.

Usage: check_paged.py COMFYUI PACK OUTPUT [FAMILY ...]. OUTPUT becomes a JSON object: family to check to what is wrong,
or "", and under `clip` the checks on SDXL with its text encoders. Without a family all, and every kind of adapter.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

FAMILIES = ("sd1", "sd2_v", "sdxl", "sdxl_v", "sd3", "flux", "chroma", "lumina2", "wan", "qwen_image")
SHORT = ("sd1", "flux", "clip")
KINDS = {"lora": 2, "dora": 2, "lokr": 2, "loha": 2, "oft": 4, "full": 1, "svdiff": 1}
"""Kinds of adapters by rank; the first two stand for those that read weights and those that do not."""
POOLS = {
    "every_page_evicted": {},
    "room_for_a_third": {"evict": 0.0, "third": True},
    "refused_faults": {"refuse": 0.5},
    "stolen_pins": {"evict": 0.5, "pins": 1 << 14},
}

if __name__ == "__main__":
    comfyui, pack, output, *chosen = sys.argv[1:]
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
    from comfy_training import assert_near, gradients, guided_picture, picture, predict, run_training, trained
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
        config = AdapterConfig(kind=kind, rank=KINDS[kind], layers="attention", **options)
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
    """A picture of the subject as it is trained, its encoding, and a prompt's."""
    subject, null = denoiser.encode_prompts([contract.CONCEPT.subject_prompt, ""])
    latents = denoiser.sample([subject], null, contract.draw(denoiser, shape, 1), steps=2, guidance=2.0)
    denoiser.encode_images(denoiser.decode_latents(latents))


def load_paged(denoiser: ComfyDenoiser, shape) -> None:
    """Another paged model is sampled in the middle: it takes every page."""
    other, clip, _ = models.build("sd1")
    with torch.inference_mode():
        picture(other, clip, models.latent_shape("sd1"))
    denoiser.model._vbar_get().free_memory(1e32)


def load_plain(denoiser: ComfyDenoiser, shape) -> None:
    """Another model is loaded in the middle for which ComfyUI unloads all others."""
    with torch.inference_mode():
        comfy.model_management.free_memory(1e30, denoiser.device)


def check_kinds(name: str, shape) -> None:
    """Losses and adapters of every kind, with pictures in between."""
    plain, paged = build_plain(name), models.build(name)
    for kind in list(KINDS)[: 2 if chosen else None]:
        assert_same(training(paged, shape, kind, preview), training(plain, shape, kind, preview))


def check_pools(name: str, shape) -> None:
    """Losses and adapter however the pool behaves, with checkpointing and without."""
    plain, paged = build_plain(name), models.build(name)
    picture(paged[0], paged[1], shape)  # pages filled in a prompt before
    wanted = training(plain, shape)
    try:
        for pool in POOLS.values():
            pages = 10**9
            if pool.get("third"):
                pages = max(paged[0].model_size() // POOL.page // 3, 8)
            POOL.set(**{"evict": 1.0, "refuse": 0.0, "pins": 1 << 30} | {k: v for k, v in pool.items() if k != "third"})
            POOL.set(pages=pages)
            assert_same(training(paged, shape), wanted)
            with ComfyDenoiser(*paged) as denoiser, ComfyDenoiser(*plain) as other:
                ours, theirs = (contract.make_step(each, shape) for each in (denoiser, other))
                assert_near(gradients(denoiser, ours, denoiser.blocks), gradients(other, theirs), 1e-5)
    finally:
        POOL.set(evict=1.0, refuse=0.0, pins=1 << 30, pages=10**9)


def check_other_models(name: str, shape) -> None:
    """Another model in the middle, paged or plain, changes nothing; for kinds that read weights too."""
    plain, paged = build_plain(name), models.build(name)
    for kind, meddle in (("lora", load_paged), ("dora", load_plain)):
        assert_same(training(paged, shape, kind, meddle), training(plain, shape, kind))


def check_lora_on_model(name: str, shape) -> None:
    """A LoRA on the MODEL is part of what is trained on."""
    plain, paged = build_plain(name), models.build(name)
    tensors, *_ = trained(*plain, shape)
    plain, paged = ((apply_adapter(model, tensors, 0.5)[0], *rest) for model, *rest in (plain, paged))
    for kind in ("lora", "dora"):
        assert_same(training(paged, shape, kind), training(plain, shape, kind))


def check_stored(name: str, shape) -> None:
    """Weights in the file's dtype, cast to the computing one in the page or at each use."""
    for kind, stored in (("lora", torch.bfloat16), ("dora", torch.float8_e4m3fn)):
        plain, paged = build_plain(name, stored, torch.float32), models.build(name, stored, torch.float32)
        assert_same(training(paged, shape, kind), training(plain, shape, kind))


def check_other_uses(name: str, shape) -> None:
    """A LoRA applied, guided by and measured, as a product of factors and as a difference of weights."""
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
            found.append({"applied": applied, "drift": drift, "guided": guided_picture(model, clip, shape, tensors)})
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
    for on in (model, apply_adapter(model, tensors, 0.5)[0]):
        before, first = state(on), picture(on, clip, shape)
        for ending in endings:
            ended = run_training(on, clip, vae, shape, ending)
            assert ended is ending, f"the training ended by {ended} instead of {ending}"
            assert not paged_vram.pinned_pages(), f"after {ending} pages are pinned"
            assert torch.equal(picture(on, clip, shape), first), f"after {ending} the picture is another one"
            assert same(before, state(on)), f"after {ending} the model is another one"
    taken = memory()
    run_training(on, clip, vae, shape, None)
    state(on)
    assert memory() <= taken, f"{memory() - taken} bytes of tensors are left behind"


def state(model) -> tuple:
    """Of a MODEL that ComfyUI has unloaded: its own tensors, what they hold, and what modules and flags there are."""
    model.detach()
    network = model.model
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    kinds = [(name, id(each), each.is_inference(), each.requires_grad) for name, each in tensors.items()]
    modules = [(name, id(each), type(each), "forward" in vars(each)) for name, each in network.named_modules()]
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in network.modules()]
    management = comfy.model_management
    ways = [name for name in ("partially_load", "partially_unload", "detach") if name in vars(model)]
    globals_ = (management.in_training, management.NUM_STREAMS, comfy.ops.cast_bias_weight)
    return values, (kinds, modules, hooks, ways, globals_)


def same(one: tuple, other: tuple) -> bool:
    return one[1] == other[1] and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def memory() -> int:
    """Bytes of every tensor that is alive."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and type(each) in (torch.Tensor, torch.nn.Parameter):
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
    if not chosen:
        wrong = {name: text for name, text in comfy_text_encoders.outcomes(*paged).items() if name != "untouched"}
        assert not any(wrong.values()), "\n".join(wrong.values())


CHECKS = (
    check_kinds,
    check_pools,
    check_other_models,
    check_lora_on_model,
    check_stored,
    check_other_uses,
    check_endings,
)


def main() -> None:
    global build_plain
    results: dict[str, dict[str, str]] = {}
    paged_vram.start(scale=1024)
    build_plain = paged_vram.unpaged(build_plain)
    models.build = paged_vram.paged(models.build)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        for name in chosen or (*FAMILIES, "clip"):
            found = results.setdefault(name, {})
            if name == "clip":
                found[check_text_encoders.__name__] = contract.outcome(check_text_encoders)
            else:
                for check in CHECKS:
                    found[check.__name__] = contract.outcome(check, name, models.latent_shape(name))
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
