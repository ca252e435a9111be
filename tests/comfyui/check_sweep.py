"""Run under ComfyUI's interpreter: the contract's main checks for every class of models that this ComfyUI knows.

Usage: check_sweep.py COMFYUI PACK OUTPUT [CLASS | CLASS:KIND ...]. OUTPUT becomes a JSON list: of each class and kind
of file what is said of it where it is refused, and where it trains what each check found wrong, or "". docs/MODELS.md
is made of it by docs/models.py.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    comfyui, pack, output, *chosen = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.model_sampling
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import contract
    import contract.network
    import contract.training
    import swept_models
    import torch
    from comfy_models import fingerprint, same
    from comfy_training import assert_near, gradients, loss_of, picture, predict, run_training, trained

    from anchor_core.backends.comfyui.apply import apply_adapter
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser


def check_prediction_is_native(denoiser: ComfyDenoiser, shape, layers) -> None:
    """z_0 by our prediction of z_t is z_0 by ComfyUI's own code."""
    noisy, timesteps = contract.draw(denoiser, shape, 1), contract.times(denoiser, (0.4,))
    condition = denoiser.encode_prompt("a photo of a dog")
    one = torch.ones_like(noisy)
    alpha, sigma = denoiser.add_noise(one, 0 * one, timesteps), denoiser.add_noise(0 * one, one, timesteps)
    model = denoiser.model.model
    with torch.no_grad():
        prediction = denoiser.predict(noisy, timesteps, [condition])
        ours = {
            "epsilon": lambda: (noisy - sigma * prediction) / alpha,
            "v_prediction": lambda: alpha * noisy - sigma * prediction,
            "flow": lambda: noisy - sigma * prediction,
        }[denoiser.prediction_type]()
        # The sigma of ComfyUI that has this ratio of noise to picture, and how it scales z_t there, by its own code.
        sampling = denoiser.model.get_model_object("model_sampling")
        own_sigma = (sigma if isinstance(sampling, comfy.model_sampling.CONST) else sigma / alpha).flatten()[:1]
        latents, noise = contract.draw(denoiser, shape, 1, seed=1), contract.draw(denoiser, shape, 1, seed=2)
        ours_of_it = denoiser.add_noise(latents, noise, timesteps)
        theirs_of_it = sampling.noise_scaling(own_sigma, noise.clone(), latents.clone())
        scale = theirs_of_it.norm() / ours_of_it.norm()
        torch.testing.assert_close(scale * ours_of_it, theirs_of_it, atol=1e-4, rtol=1e-4)
        x = scale * noisy
        x = x.unsqueeze(2) if model.latent_format.latent_dimensions == 3 else x
        guidance = {"guidance": 1.0} if model.model_config.unet_config.get("guidance_embed") else {}
        conds = comfy.sampler_helpers.convert_cond([[condition.cross_attention, condition.extras | guidance]])
        empty, device = torch.zeros_like(x), denoiser.device  # as KSampler with an empty latent and no mask
        conds = comfy.samplers.process_conds(model, x, {"positive": conds}, device, empty, None, 0)["positive"]
        (theirs,) = comfy.samplers.calc_cond_batch(model, [conds], x, own_sigma, denoiser.model.model_options)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-4, rtol=1e-4)


def check_checkpointing(denoiser: ComfyDenoiser, shape, layers) -> None:
    """Where blocks are known, gradients are the same with and without gradient checkpointing."""
    if denoiser.can_checkpoint:
        contract.network.check_blocks(denoiser, shape)
        step = contract.make_step(denoiser, shape)
        assert_near(gradients(denoiser, step, denoiser.blocks, layers=layers), gradients(denoiser, step, layers=layers))


def check_gradients_are_slopes(denoiser: ComfyDenoiser, shape, layers) -> None:
    """The gradient reaches most of the adapter, and along itself is the slope of the loss, by finite differences."""
    step = contract.make_step(denoiser, shape)
    with contract.attached(denoiser, layers) as adapter:
        parts = torch.autograd.grad(loss_of(denoiser, step), adapter.parameters(), materialize_grads=True)
        reached = sum(bool(part.any()) for part in parts) / len(parts)
        assert reached > 0.5, f"the gradient reaches {reached:.0%} of the adapter's tensors"
        norm = torch.cat([part.flatten() for part in parts]).norm()
        sides = []
        with torch.no_grad():
            for distance in (3e-4, -6e-4):  # HiDream routes tokens to experts: not smooth over more
                for parameter, part in zip(adapter.parameters(), parts):
                    parameter += distance * part / norm
                sides.append(loss_of(denoiser, step))
    torch.testing.assert_close(((sides[0] - sides[1]) / 6e-4).float(), norm, rtol=0.03, atol=0)


def check_stock_loader(model, clip, vae, shape, layers) -> None:
    """The LoRA's file through ComfyUI's own loader, and through ours, predicts what the adapter did."""
    tensors, prediction, layers = trained(model, clip, vae, shape, layers=layers, alpha=1.0)
    stock, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
    read = sum(key.endswith(".weight") for key in stock.patches)
    assert read == layers, f"ComfyUI reads {read} of {layers} layers"
    for on in (stock, apply_adapter(model, tensors, 1.0)[0]):
        torch.testing.assert_close(predict(on, clip, vae, shape), prediction, atol=1e-4, rtol=1e-4)


def check_untouched(model, clip, vae, shape, layers) -> None:
    """After a training, and after one that ends by an error: the same model, the same next picture."""
    first, before = picture(model, clip, shape), fingerprint(model)
    for ending in (None, RuntimeError):
        run_training(model, clip, vae, shape, ending, layers)
        assert same(before, fingerprint(model)), f"after {ending} the model is another one"
        assert torch.equal(picture(model, clip, shape), first), f"after {ending} the picture is another one"


def of_contract() -> tuple:
    network, training = contract.network, contract.training
    return (
        network.check_adapter_off_is_untouched,
        training.check_zero_weight_is_reconstruction,
        training.check_anchor_gradient_is_blended,
        network.check_noise_process,
        network.check_rows_are_independent,
        training.check_memorises,
        network.check_detach_restores,
        network.check_file_keys,
        network.check_pictures,
        network.check_sampling,
    )


INSIDE = ("check_prediction_is_native", "check_gradients_are_slopes", "check_checkpointing")
AROUND = ("check_stock_loader", "check_untouched")


def sweep(name: str, kind: str) -> dict[str, Any]:
    """What is found of one class: a ValueError before anything is trained is its refusal, and no other error is."""
    found: dict[str, Any] = {"class": name, "kind": kind}
    model, clip, vae, shape, layers = swept_models.build(name, kind)
    try:
        denoiser = ComfyDenoiser(model, clip, vae)
    except ValueError as error:
        return found | {"refused": str(error)}
    checks = found["checks"] = {}
    with denoiser:
        conds = denoiser._encoded(denoiser.encode_prompt("a dog"), denoiser._frames(contract.draw(denoiser, shape, 1)))
        found |= {
            "network": type(denoiser.network).__name__,
            "predicts": denoiser.prediction_type,
            "frames": denoiser._video,
            "concatenates": "c_concat" in conds,
            "checkpointing": denoiser.can_checkpoint,
        }
        for check in of_contract():
            options = {"layers": layers} if "layers" in inspect.signature(check).parameters else {}
            checks[check.__name__] = contract.outcome(check, denoiser, shape, **options)
        for check in INSIDE:
            checks[check] = contract.outcome(globals()[check], denoiser, shape, layers)
    for check in AROUND:
        checks[check] = contract.outcome(globals()[check], model, clip, vae, shape, layers)
    return found


def main() -> None:
    results = []
    with torch.inference_mode():  # as ComfyUI runs every prompt
        for name, kind in swept_models.kinds():
            if not chosen or name in chosen or f"{name}:{kind}" in chosen:
                start = time.process_time()
                results.append(sweep(name, kind))
                print(f"{name} {kind}: {time.process_time() - start:.1f} s of CPU")
                Path(output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
