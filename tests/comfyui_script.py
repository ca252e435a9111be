"""Run under ComfyUI's interpreter: what its backend computes, for `test_comfyui.py` to compare with diffusers.

Usage: comfyui_script.py COMFYUI PACK WEIGHTS INPUTS OUTPUTS (the last two are safetensors files). The outputs hold the
results; under `untouched.` whether the model was the same afterwards, for each way in which a training can end; under
`denoised.` and `implied.` what ComfyUI and what our prediction say z_0 is, for each kind of model; under
`text_encoder.` what is wrong with adapters of text encoders.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

comfyui, pack, weights, inputs, outputs = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.model_sampling as kinds  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import contract  # noqa: E402
import torch  # noqa: E402
from comfyui_models import fingerprint, same  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from anchor_core.adapter import AdapterConfig  # noqa: E402
from anchor_core.adapter_file import to_file_keys  # noqa: E402
from anchor_core.backends.comfyui import ComfyDenoiser, apply_adapter  # noqa: E402
from anchor_core.data import Concept  # noqa: E402
from anchor_core.sandbox.comfyui import load  # noqa: E402
from anchor_core.trainer import TrainSettings, train  # noqa: E402

CONCEPT = Concept("a photo of a sks star", "a photo of a star")


def ends_by(error: type[BaseException], model, clip, vae, latents) -> bool:
    """Whether a training that ends by `error` after two steps leaves the model as it was."""

    def stop(report) -> None:
        if report.step == 2:
            raise error("in the middle of a training")

    before = fingerprint(model)
    try:
        with ComfyDenoiser(model, clip, vae) as denoiser:
            adapter = denoiser.attach(AdapterConfig(rank=4), 0)
            train(denoiser, adapter, latents, CONCEPT, TrainSettings(steps=5, batch_size=2), on_step=stop)
    except error:
        return same(before, fingerprint(model))
    return False


def with_sampling(model, *bases):
    """A clone of the model that is taken to predict in another way."""
    clone = model.clone()
    clone.add_object_patch("model_sampling", type("ModelSampling", bases, {})(model.model.model_config))
    return clone


def denoised(model, clip, vae, given) -> tuple[torch.Tensor, torch.Tensor]:
    """z_0 by ComfyUI's own sampling code, and by our prediction of z_t."""
    with ComfyDenoiser(model, clip, vae) as denoiser, torch.no_grad():
        condition, z_t, timesteps = (
            denoiser.encode_prompt("a photo of a star"),
            given["noisy"][:1],
            given["timesteps"][:1],
        )
        prediction = denoiser.predict(z_t, timesteps, [condition])
        alpha, sigma, own_sigma = denoiser._coefficients(timesteps)
        x = z_t if denoiser.prediction_type == "flow" else z_t / alpha
        conds = comfy.sampler_helpers.convert_cond([[condition.cross_attention, {}]])
        conds = comfy.samplers.process_conds(model.model, x, {"positive": conds}, denoiser.device)["positive"]
        (theirs,) = comfy.samplers.calc_cond_batch(model.model, [conds], x, own_sigma, model.model_options)
        return theirs, {
            "epsilon": lambda: (z_t - sigma * prediction) / alpha,
            "v_prediction": lambda: alpha * z_t - sigma * prediction,
            "flow": lambda: z_t - sigma * prediction,
        }[denoiser.prediction_type]()


def refusal(model, clip, vae) -> str:
    try:
        ComfyDenoiser(model, clip, vae)
    except ValueError as error:
        return str(error)
    return ""


def check_stock_loader(model, clip, vae) -> None:
    """ComfyUI's own loader gives a CLIP that encodes as `adapted=True` does."""
    with ComfyDenoiser(model, clip, vae) as denoiser, torch.no_grad():
        plain = denoiser.encode_prompt(CONCEPT.class_prompt).cross_attention
        with contract.attached(denoiser, "attention", text_encoder=True, alpha=1.0) as adapter:
            tensors = to_file_keys(adapter, denoiser.file_keys())
            ours = denoiser.encode_prompt(CONCEPT.class_prompt, adapted=True).cross_attention
    _, patched = comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0)
    ((theirs, _),) = patched.encode_from_tokens_scheduled(patched.tokenize(CONCEPT.class_prompt))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, plain, atol=1e-3)


def check_slope(denoiser, shape) -> None:
    """The gradient of the text encoder's adapter along itself is the slope of the loss, by finite differences."""
    noisy, timesteps = contract.draw(denoiser, shape, 1), contract.times(denoiser, (0.5,))
    with contract.attached(denoiser, "attention", text_encoder=True) as adapter:
        factors = [
            f for n in adapter.module_names if ":" in n for f in adapter.layer(n).parameters() if f.requires_grad
        ]

        def loss() -> torch.Tensor:
            condition = denoiser.encode_prompt(CONCEPT.class_prompt, adapted=True)
            return denoiser.predict(noisy, timesteps, [condition]).double().square().mean()

        gradients = torch.autograd.grad(loss(), factors, materialize_grads=True)
        norm, sides = torch.cat([part.flatten() for part in gradients]).norm(), []
        with torch.no_grad():
            for distance in (3e-2, -6e-2):
                for factor, part in zip(factors, gradients, strict=True):
                    factor += distance * part / norm
                sides.append(loss())
    torch.testing.assert_close(((sides[0] - sides[1]) / 6e-2).float(), norm, rtol=0.03, atol=0)


def outcome(check, *arguments, **options) -> str:
    try:
        check(*arguments, **options)
    except Exception:  # what is wrong is what this script is asked for
        return traceback.format_exc()
    return ""


def text_encoder(model, clip, vae) -> dict[str, str]:
    """What is wrong with adapters of text encoders, by check."""
    found, shape, contract.CONCEPT = {}, (4, 16, 16), CONCEPT
    comfy.model_management.load_models_gpu([model, clip.patcher])  # a clone with a LoRA was the last one
    before = fingerprint(model), fingerprint(clip.patcher)
    with ComfyDenoiser(model, clip, vae) as denoiser:
        found["adapter"] = outcome(contract.check_text_encoder_adapter, denoiser, shape)
        found["file_keys"] = outcome(contract.check_file_keys, denoiser, shape, text_encoder=True)
        found["detach"] = outcome(contract.check_detach_restores, denoiser, shape, text_encoder=True)
        found["slope"] = outcome(check_slope, denoiser, shape)
    after = fingerprint(model), fingerprint(clip.patcher)
    found["untouched"] = "" if all(map(same, before, after)) else "MODEL or CLIP is another one"
    found["stock_loader"] = outcome(check_stock_loader, model, clip, vae)
    return found


def main() -> None:
    given, results = load_file(inputs), {}
    with torch.inference_mode():  # as ComfyUI runs every prompt
        model, clip, vae = load(Path(weights))
        before = fingerprint(model)
        with ComfyDenoiser(model, clip, vae) as denoiser:
            latents = results["latents"] = denoiser.encode_images(given["pixels"])
            results["decoded"] = denoiser.decode_latents(given["latents"])
            conditions = [denoiser.encode_prompt(p) for p in (CONCEPT.subject_prompt, CONCEPT.class_prompt)]
            results["noisy"] = denoiser.add_noise(given["latents"], given["noise"], given["timesteps"])
            results["target"] = denoiser.target(given["latents"], given["noise"], given["timesteps"])
            results["epsilon_scale"] = denoiser.epsilon_scale(given["timesteps"])
            with torch.no_grad():
                results["prediction"] = denoiser.predict(given["noisy"], given["timesteps"], conditions)
            adapter = denoiser.attach(AdapterConfig(rank=4), 0)
            settings = TrainSettings(steps=10, batch_size=2, seed=3)
            results["losses"] = torch.tensor(train(denoiser, adapter, given["latents"], CONCEPT, settings).losses)
            with torch.no_grad():
                results["adapted"] = denoiser.predict(given["noisy"], given["timesteps"], conditions)
                tensors = to_file_keys(adapter, denoiser.file_keys())
                with denoiser.adapter_disabled():
                    results["disabled"] = denoiser.predict(given["noisy"], given["timesteps"], conditions)
        results["untouched.finished"] = torch.tensor(same(before, fingerprint(model)))
        for error in (RuntimeError, comfy.model_management.InterruptProcessingException):
            results[f"untouched.{error.__name__}"] = torch.tensor(ends_by(error, model, clip, vae, latents))
        for name, on in {"patched": apply_adapter(model, tensors, 1.0)[0], "again": model}.items():
            with ComfyDenoiser(on, clip, vae) as denoiser, torch.no_grad():
                results[name] = denoiser.predict(given["noisy"], given["timesteps"], conditions)
        for name, bases in {
            "epsilon": (kinds.ModelSamplingDiscrete, kinds.EPS),
            "v_prediction": (kinds.ModelSamplingDiscrete, kinds.V_PREDICTION),
            "flow": (kinds.ModelSamplingDiscreteFlow, kinds.CONST),
        }.items():
            pair = denoised(with_sampling(model, *bases), clip, vae, given)
            results[f"denoised.{name}"], results[f"implied.{name}"] = pair
        wrapped = model.clone()
        wrapped.set_model_unet_function_wrapper(lambda apply, arguments: None)
        edm = with_sampling(model, kinds.ModelSamplingContinuousEDM, kinds.V_PREDICTION)
        for name, refused in {"wrapped": wrapped, "edm": edm}.items():
            results[f"refusal.{name}"] = torch.frombuffer(
                bytearray(refusal(refused, clip, vae).encode()), dtype=torch.uint8
            )
        for name, text in text_encoder(model, clip, vae).items():
            results[f"text_encoder.{name}"] = torch.frombuffer(bytearray(f"{text}\n".encode()), dtype=torch.uint8)
    save_file({name: tensor.clone().contiguous() for name, tensor in results.items()}, outputs)


main()
