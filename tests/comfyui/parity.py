"""Run under ComfyUI's interpreter: what its backend computes, for `test_parity_comfyui.py` to compare with diffusers.

Usage: parity.py COMFYUI PACK WEIGHTS INPUTS OUTPUTS (the last two are safetensors files). The outputs hold the
results; under `untouched.` whether the model was the same afterwards, for each way in which a training can end; under
`denoised.` and `implied.` what ComfyUI and what our prediction say z_0 is, for each kind of model; under
`text_encoder.` what is wrong with adapters of text encoders.
"""

from __future__ import annotations

import sys
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
import comfy_text_encoders as text_encoders  # noqa: E402
import torch  # noqa: E402
from comfy_models import fingerprint, same  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from anchor_core.adapters.config import AdapterConfig  # noqa: E402
from anchor_core.adapters.file import to_file_keys  # noqa: E402
from anchor_core.backends.comfyui.apply import apply_adapter  # noqa: E402
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser  # noqa: E402
from anchor_core.concept import Concept  # noqa: E402
from anchor_core.sandbox.comfyui import load  # noqa: E402
from anchor_core.training.settings import TrainSettings  # noqa: E402
from anchor_core.training.trainer import train  # noqa: E402

CONCEPT = Concept("a photo of a sks star", "a photo of a star")


def ends_by(error: type[BaseException], model, clip, vae, latents) -> bool:
    """Whether a training that ends by `error` after two steps leaves the model as it was."""

    def stop(event) -> None:
        if event.event == "step" and event.step == 2:
            raise error("in the middle of a training")

    before = fingerprint(model)
    try:
        with ComfyDenoiser(model, clip, vae) as denoiser:
            adapter = denoiser.attach(AdapterConfig(rank=4), 0)
            train(denoiser, adapter, latents, CONCEPT, TrainSettings(steps=5, batch_size=2), tell=stop)
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
                results |= {f"file.{key}": tensor for key, tensor in tensors.items()}
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
        for family, parts in {"sd1": (model, clip, vae), "sdxl": text_encoders.sdxl()}.items():
            for name, text in text_encoders.outcomes(*parts).items():
                said = torch.frombuffer(bytearray(f"{text}\n".encode()), dtype=torch.uint8)
                results[f"text_encoder.{family}.{name}"] = said
    save_file({name: tensor.clone().contiguous() for name, tensor in results.items()}, outputs)


main()
