"""Run under ComfyUI's interpreter: the contract, and what only ComfyUI's backend promises, for each family of models.

Usage: check_contract.py COMFYUI PACK OUTPUT [--paged | --device] [FAMILY ...]. OUTPUT becomes a JSON object: family to
check to what is wrong, or "", and under `refused` what is said of models that cannot be trained on. The families named,
or all, are held to the whole contract, the others to what ComfyUI does with a MODEL besides (`AROUND`). With `--paged`
the models lie in pages (`paged_vram.py`), and checks that assume plain ones are left to `check_paged.py`. With
`--device` ComfyUI computes on a device that is not the CPU (`second_device.py`), and the families named are the only
ones.
"""

from __future__ import annotations

import json
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path

FAMILIES = ("sd1", "sd2_v", "sdxl", "sdxl_v", "sd3", "flux", "chroma", "lumina2", "wan", "qwen_image")
PATCHED = ("sd1", "sd2_v", "sdxl", "sdxl_v", "flux")
OTHERS = ("lora", "loha", "lokr")
REFUSED = ("fp8_matrix_mult", "quantised", "integers", "packed_latents", "text_encoder")

if __name__ == "__main__":
    comfyui, pack, output, *chosen = sys.argv[1:]
    paged, elsewhere = "--paged" in chosen, "--device" in chosen
    chosen = [each for each in chosen if not each.startswith("--")]
    sys.argv = [sys.argv[0], "--force-fp32" if elsewhere else "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import paged_vram
    import second_device

    if paged:
        paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()
    if elsewhere:
        second_device.comfyui_takes_it()

    import comfy.sample
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import comfy_models as models
    import contract
    import torch
    from comfy.ldm.modules import attention
    from comfy_models import fingerprint, same
    from comfy_training import assert_near, gradients, loss_of, picture, predict, run_training, trained
    from torch import Tensor
    from training_refusals import refusal, refusal_of_adapter

    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.backends.comfyui.apply import apply_adapter
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from anchor_core.training.events import StepMade
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train


def check_prediction_is_native(name: str, denoiser: ComfyDenoiser, shape) -> None:
    """z_0 by our prediction of z_t is z_0 by ComfyUI's own code, and so is the noise process around it."""
    noisy, timesteps = contract.draw(denoiser, shape, 1), contract.times(denoiser, (0.4,))
    condition = denoiser.encode_prompt("a photo of a dog")
    one = torch.ones_like(noisy)
    alpha, sigma = denoiser.add_noise(one, 0 * one, timesteps), denoiser.add_noise(0 * one, one, timesteps)
    with torch.no_grad():
        prediction = denoiser.predict(noisy, timesteps, [condition])
        flow = denoiser.prediction_type == "flow"
        ours = {
            "epsilon": lambda: (noisy - sigma * prediction) / alpha,
            "v_prediction": lambda: alpha * noisy - sigma * prediction,
            "flow": lambda: noisy - sigma * prediction,
        }[denoiser.prediction_type]()
        # ComfyUI's own x and sigma; the guidance is the training's, which the sampler would not give by itself.
        x, own_sigma = (noisy, sigma) if flow else (noisy / alpha, sigma / alpha)
        x = x.unsqueeze(2) if name in ("wan", "qwen_image") else x
        model = denoiser.model
        conds = comfy.sampler_helpers.convert_cond([[condition.cross_attention, condition.extras | {"guidance": 1.0}]])
        if name == "chroma":
            conds[0].pop("guidance")
        conds = comfy.samplers.process_conds(model.model, x, {"positive": conds}, denoiser.device)["positive"]
        sigmas = own_sigma.flatten()[:1]
        (theirs,) = comfy.samplers.calc_cond_batch(model.model, [conds], x, sigmas, model.model_options)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-4, rtol=1e-4)


def check_what_the_network_is_given(name: str, denoiser: ComfyDenoiser, shape) -> None:
    """Time on the network's own axis, z_t itself, SDXL's vector of sizes, Flux's guidance in training and sampling."""
    seen: list[tuple] = []
    hook = denoiser.network.register_forward_pre_hook(
        lambda module, arguments, options: seen.append((arguments, options)), with_kwargs=True
    )
    try:
        noisy, timesteps = contract.draw(denoiser, shape, 1), contract.times(denoiser, (0.4,))
        condition = denoiser.encode_prompt("a photo of a dog")
        with torch.no_grad():
            denoiser.predict(noisy, timesteps, [condition])
        denoiser.sample([condition], condition, noisy, steps=1, guidance=2.0)
    finally:
        hook.remove()
    (x, time), options = seen[0]
    axis = {"sd3": 1000, "wan": 1000}.get(name, 1) if denoiser.prediction_type == "flow" else 1000
    torch.testing.assert_close(time.cpu().float(), torch.tensor([0.4 * axis]))
    torch.testing.assert_close(x.reshape(noisy.shape), noisy, atol=1e-5, rtol=1e-5)
    if name.startswith("sdxl"):
        sizes = torch.tensor([64.0, 64, 0, 0, 64, 64], device=denoiser.device)
        expected = torch.cat(
            [condition.extras["pooled_output"].flatten().to(sizes), denoiser.model.model.embedder(sizes).flatten()]
        )
        torch.testing.assert_close(options["y"][0].cpu(), expected.cpu())
    if name == "flux":
        assert options["guidance"].tolist() == [1.0], f"in training the guidance is {options['guidance']}"
        assert set(seen[1][1]["guidance"].tolist()) == {3.5}, f"in sampling it is {seen[1][1]['guidance']}"


def check_gradient_checkpointing(name: str, denoiser: ComfyDenoiser, shape) -> None:
    """Gradients with and without it are the same."""
    step = contract.make_step(denoiser, shape)
    assert_near(gradients(denoiser, step, denoiser.blocks), gradients(denoiser, step))


def check_gradients_are_slopes(name: str, denoiser: ComfyDenoiser, shape) -> None:
    """The gradient along itself is the slope of the loss there, by finite differences."""
    with contract.attached(denoiser) as adapter:
        step = contract.make_step(denoiser, shape)
        parts = torch.autograd.grad(loss_of(denoiser, step), adapter.parameters(), materialize_grads=True)
        norm = torch.cat([part.flatten() for part in parts]).norm()
        sides = []
        with torch.no_grad():
            for distance in (3e-3, -6e-3):
                for parameter, part in zip(adapter.parameters(), parts):
                    parameter += distance * part / norm
                sides.append(loss_of(denoiser, step))
        slope = (sides[0] - sides[1]) / 6e-3
    torch.testing.assert_close(slope.float(), norm, rtol=0.03, atol=0)


def check_prompts_in_one_go(name: str, denoiser: ComfyDenoiser, shape) -> None:
    """`encode_prompts` is `encode_prompt` of each."""
    prompts = ["a dog", "", "a photo of a dog"]
    for one, other in zip(denoiser.encode_prompts(prompts), map(denoiser.encode_prompt, prompts), strict=True):
        assert torch.equal(one.cross_attention, other.cross_attention)
        assert torch.equal(one.extras["pooled_output"], other.extras["pooled_output"])


def check_stock_loader(name: str, model, clip, vae, shape) -> None:
    """The adapter's file through ComfyUI's own loader, and through ours, predicts what the adapter did."""
    for kind in ("lora", "loha", "lokr", "full", "svdiff"):
        # The whole of a network is too much for `full`.
        options = {"kind": kind, "alpha": 1.0} | ({"layers": r"\.(to_q|qkv|q)$"} if kind == "full" else {})
        tensors, prediction, layers = trained(model, clip, vae, shape, **options)
        stock, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
        read = sum(key.endswith(".weight") for key in stock.patches)
        assert read == layers, f"ComfyUI reads {read} of {layers} layers ({kind})"
        for on in (stock, apply_adapter(model, tensors, 1.0)[0]):
            torch.testing.assert_close(predict(on, clip, vae, shape), prediction, atol=1e-4, rtol=0)


def check_untouched(name: str, model, clip, vae, shape) -> None:
    """However a training ends, with and without a LoRA on the MODEL: the same model, the same next picture."""
    tensors, *_ = trained(model, clip, vae, shape)
    endings = (None, RuntimeError, comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError)
    for on in (model, apply_adapter(model, tensors, 0.5)[0]):
        first = picture(on, clip, shape)
        before = fingerprint(on)
        for ending in endings:
            ended = run_training(on, clip, vae, shape, ending)
            assert ended is ending, f"the training ended by {ended} instead of {ending}"
            assert same(before, fingerprint(on)), f"after {ending} the model is another one"
            assert torch.equal(picture(on, clip, shape), first), f"after {ending} the picture is another one"


def check_lora_on_model_is_pretrained(name: str, model, clip, vae, shape) -> None:
    """Gradients on a MODEL with a LoRA are those on one whose weights were merged beforehand."""
    tensors, *_ = trained(model, clip, vae, shape)
    patched = apply_adapter(model, tensors, 0.5)[0]
    comfy.model_management.load_models_gpu([patched])
    values = {key: value.clone() for key, value in patched.model.state_dict().items()}
    base, _, _ = models.build(name)
    base.model.load_state_dict(values)
    with ComfyDenoiser(patched, clip, vae) as denoiser:
        ours = gradients(denoiser, contract.make_step(denoiser, shape))
    with ComfyDenoiser(base, clip, vae) as denoiser:
        assert_near(ours, gradients(denoiser, contract.make_step(denoiser, shape)), 1e-6)
    assert not torch.equal(predict(patched, clip, vae, shape), predict(model, clip, vae, shape))


def check_fp8(name: str, model, clip, vae, shape) -> None:
    """Weights in fp8, cast where they are used: predictions, gradients and the end are those of what they stand for."""
    stored, _, _ = models.build(name, torch.float8_e4m3fn, torch.float32)
    plain, _, _ = models.build(name)
    plain.model.load_state_dict({key: value.float() for key, value in stored.model.state_dict().items()})
    before, found = fingerprint(stored), []
    for on in (stored, plain):
        with ComfyDenoiser(on, clip, vae) as denoiser:
            step = contract.make_step(denoiser, shape)
            adapters = ({}, {"blocks": denoiser.blocks}, {"kind": "dora"}, {"kind": "svdiff"})
            found.append([gradients(denoiser, step, **options) for options in adapters])
    for stored_ones, plain_ones in zip(*found, strict=True):
        assert_near(stored_ones, plain_ones)
    assert same(before, fingerprint(stored)), "the model in fp8 is another one"
    run_training(stored, clip, vae, shape, RuntimeError)
    assert same(before, fingerprint(stored)), "after a training the model in fp8 is another one"


def check_patches_by_block(name: str, model, clip, vae, shape) -> None:
    """Patches of attention that look at the block they are in do the same when it is computed again."""
    patched = model.clone()

    def scale(attended: Tensor, options: dict) -> Tensor:
        return attended * (1 + zlib.crc32(repr((options.get("block"), options.get("block_index"))).encode()) / 2**32)

    patched.set_model_attn1_output_patch(scale)
    with ComfyDenoiser(patched, clip, vae) as denoiser:
        step = contract.make_step(denoiser, shape)
        assert_near(gradients(denoiser, step, denoiser.blocks), gradients(denoiser, step))
    if name in PATCHED:
        assert not torch.equal(predict(patched, clip, vae, shape), predict(model, clip, vae, shape))


def check_low_vram(name: str, model, clip, vae, shape) -> None:
    """ComfyUI offloads half of a model with a LoRA meanwhile: layers patched at each use have the whole's gradients."""
    tensors, *_ = trained(model, clip, vae, shape)
    patched = apply_adapter(model, tensors, 0.5)[0]
    first = picture(patched, clip, shape)
    kinds = [(type(module), p.is_inference()) for module in patched.model.modules() for p in module.parameters()]
    with ComfyDenoiser(patched, clip, vae) as denoiser:
        step = contract.make_step(denoiser, shape)
        whole, dora = gradients(denoiser, step), gradients(denoiser, step, kind="dora")
        patched.partially_unload(patched.offload_device, patched.model_size() // 2)
        assert_near(gradients(denoiser, step), whole)
        assert_near(gradients(denoiser, step, denoiser.blocks), whole)
        assert_near(gradients(denoiser, step, kind="dora"), dora)
        assert patched.model.model_lowvram
        assert any(getattr(module, "weight_function", ()) for module in patched.model.modules())
    after = [(type(module), p.is_inference()) for module in patched.model.modules() for p in module.parameters()]
    assert after == kinds, "modules or parameters are others"
    assert torch.equal(picture(patched, clip, shape), first), "the picture is another one"


def check_preview_in_low_vram(name: str, model, clip, vae, shape) -> None:
    """A picture in the middle of a training with half of the model offloaded: ComfyUI leaves the adapter alone."""
    found = []
    for memory in (0, model.model_size() // 2):
        with ComfyDenoiser(model, clip, vae) as denoiser:
            adapter = denoiser.attach(AdapterConfig(rank=2), 0)
            condition = denoiser.encode_prompt("a photo of a dog")

            def preview(event, denoiser=denoiser, condition=condition, memory=memory) -> None:
                if isinstance(event, StepMade):
                    if memory and event.step == 1:
                        model.partially_unload(model.offload_device, memory)
                    denoiser.sample([condition], condition, contract.draw(denoiser, shape, 1), steps=1, guidance=2.0)

            latents, settings = contract.draw(denoiser, shape, 1), TrainSettings(steps=3, learning_rate=1e-2)
            history = train(denoiser, adapter, latents, contract.CONCEPT, settings, tell=preview)
            assert model.model.model_lowvram == bool(memory), "ComfyUI loaded the model again"
            found.append(([torch.tensor(history.losses)], adapter.parameters()))
    (losses, factors), (other_losses, other_factors) = found
    assert_near(losses, other_losses)
    assert_near([each.detach() for each in factors], [each.detach() for each in other_factors])


def check_attention_for_sampling_alone(name: str, denoiser: ComfyDenoiser, shape) -> None:
    """Where ComfyUI's own attention or that of a node has no gradient, as Sage's, training has it all the same."""
    step, attend = contract.make_step(denoiser, shape), attention.efficient_dot_product_attention
    wanted, options = gradients(denoiser, step), denoiser.model.model_options["transformer_options"]
    denoiser.model.set_model_optimized_attention(
        lambda *given, **own: attention.attention_split(*given, **own).detach()
    )
    try:
        assert_near(gradients(denoiser, step), wanted)
    finally:
        del options["optimized_attention_override"]
    attention.efficient_dot_product_attention = lambda *arguments, **options: attend(*arguments, **options).detach()
    try:
        assert_near(gradients(denoiser, step), wanted)
    finally:
        attention.efficient_dot_product_attention = attend


INSIDE = (
    "check_prediction_is_native",
    "check_what_the_network_is_given",
    "check_gradient_checkpointing",
    "check_gradients_are_slopes",
    "check_prompts_in_one_go",
    "check_attention_for_sampling_alone",
)
AROUND = (
    "check_stock_loader",
    "check_untouched",
    "check_lora_on_model_is_pretrained",
    "check_fp8",
    "check_low_vram",
    "check_preview_in_low_vram",
    "check_patches_by_block",
)
AROUND_PAGED = ("check_stock_loader", "check_patches_by_block")
AROUND_ELSEWHERE = ("check_stock_loader", "check_lora_on_model_is_pretrained", "check_patches_by_block")
"""What the second device can show: its tensors do not become the CPU's in place, nor are errors raised inside of it."""


def main() -> None:
    results: dict[str, dict[str, str]] = {"refused": {}}
    around = AROUND_PAGED if paged else AROUND_ELSEWHERE if elsewhere else AROUND
    if paged:
        paged_vram.start(scale=1024)
        models.build = paged_vram.paged(models.build)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        for kind in () if paged or elsewhere else REFUSED:
            results["refused"][kind] = refusal(kind)
        for kind in OTHERS:
            results["refused"][f"{kind}_of_another_model"] = refusal_of_adapter(kind)
        for name in FAMILIES:
            whole = name in chosen or not chosen
            if elsewhere and not whole:
                continue
            model, clip, vae = models.build(name)
            shape, found = models.latent_shape(name), results.setdefault(name, {})
            if whole:
                with ComfyDenoiser(model, clip, vae) as denoiser:
                    for check in contract.CHECKS:
                        found[check.__name__] = contract.outcome(check, denoiser, shape)
                    for check in INSIDE:
                        found[check] = contract.outcome(globals()[check], name, denoiser, shape)
            for check in around:
                found[check] = contract.outcome(globals()[check], name, model, clip, vae, shape)
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    if elsewhere:
        second_device.are_plain()
    with second_device.device() if elsewhere else nullcontext():
        main()
