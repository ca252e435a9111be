"""The denoiser over the model that ComfyUI manages: its own weights, no second load, no copy.

Inside `with ComfyDenoiser(model, clip, vae) as denoiser:` the network can be trained through; afterwards the model
holds the very parameters, modules and flags that it held before, also when the block ends by an error or an interrupt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..adapter import Adapter, AdapterConfig

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ComfyCondition:
    """One encoded prompt: ComfyUI's cross-attention tensor (1, tokens, width) and its companions.

    `encoded` keeps what the model makes of them, by latent shape.
    """

    cross_attention: Tensor
    extras: dict[str, Any]
    encoded: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)


class ComfyDenoiser:
    """`Denoiser` over a MODEL, CLIP and VAE of ComfyUI.

    Epsilon and v models: timesteps lie on the discrete axis 0 ... 999 and z_t = alpha_t z_0 + sigma_t epsilon, as in
    diffusers; ComfyUI's own x = z_t / alpha_t at its sigma = sigma_t / alpha_t stays inside. Flow models: timesteps are
    1000 sigma and z_t = (1 - sigma) z_0 + sigma epsilon. LoRAs that the MODEL already carries are part of the
    pretrained network.

    Raises:
        ValueError: the model cannot be trained through; one sentence says why.
    """

    def __init__(self, model, clip, vae):
        self.model, self.clip, self.vae = model, clip, vae
        self.adapter: Adapter | None = None
        self._swapped: list[tuple[dict, str, Tensor]] = []
        self._stack: ExitStack | None = None
        _check_supported(model)
        self.prediction_type = _prediction_type(model.get_model_object("model_sampling"))

    # --- the model that ComfyUI manages -----------------------------------------------------------------------

    def __enter__(self) -> ComfyDenoiser:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.callback(setattr, comfy.model_management, "in_training", comfy.model_management.in_training)
            comfy.model_management.in_training = True
            stack.callback(self.model.cleanup)
            stack.callback(self._restore_weights)
            stack.callback(self.detach)
            self._load()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        stack, self._stack = self._stack, None
        stack.close()

    def _load(self) -> None:
        """Have ComfyUI load the whole model, then put trainable-through views in place of its inference tensors."""
        comfy.model_management.load_models_gpu([self.model], force_full_load=True)
        if self.model.model.model_lowvram:
            raise ValueError("the model does not fit on the device whole; free memory or train a smaller model")
        self.model.pre_run()
        _check_weights(self.model.model)
        views: dict[int, Tensor] = {}
        for module in self.model.model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        self._swapped.append((table, name, tensor))
                        table[name] = views.setdefault(id(tensor), _normal_view(tensor))

    def _restore_weights(self) -> None:
        while self._swapped:
            table, name, original = self._swapped.pop()
            current = table[name]
            if current.data_ptr() != original.data_ptr():  # ComfyUI moved the weights to another device meanwhile
                with torch.inference_mode():
                    original.data = current.data
            table[name] = original

    @contextmanager
    def _released(self) -> Iterator[None]:
        """The model as ComfyUI knows it, while another model (CLIP, VAE) is loaded, which may unload this one."""
        with _layers_out(self.network):
            self._restore_weights()
            yield
            self._load()

    @property
    def network(self) -> torch.nn.Module:
        return self.model.model.diffusion_model

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    @property
    def _sampling(self):
        return self.model.model.model_sampling

    # --- the adapter ------------------------------------------------------------------------------------------

    def attach(self, config: AdapterConfig, seed: int = 0) -> Adapter:
        """Inject a new adapter into the network; call inside the `with` block."""
        if self._stack is None:
            raise RuntimeError("attach was called outside the `with` block; enter the denoiser first")
        if self.adapter is not None:
            raise ValueError("the denoiser already has an adapter; detach it first")
        self.adapter = Adapter.attach(self.network, config, seed, self.file_keys())
        return self.adapter

    def detach(self) -> None:
        """Take the adapter out, if there is one: the network gets its own modules back."""
        adapter, self.adapter = self.adapter, None
        if adapter is not None:
            adapter.detach()

    def adapter_disabled(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def file_keys(self) -> dict[str, str]:
        """Names of the network's modules to key prefixes that the stock LoraLoader reads.

        SD1.x and SD2.x: `lora_unet_<diffusers name>`, which diffusers reads as well; SDXL: `lora_unet_<original name>`;
        other networks: `diffusion_model.<name>`.
        """
        config = self.model.model.model_config.unet_config
        names = comfy.utils.unet_to_diffusers(config)
        if not names:
            modules = (name for name, _ in self.network.named_modules() if name)
            return {name: f"diffusion_model.{name}" for name in modules}
        suffix = ".weight"
        pairs = {name[: -len(suffix)]: key[: -len(suffix)] for key, name in names.items() if key.endswith(suffix)}
        original = config.get("adm_in_channels") is not None
        return {name: f"lora_unet_{(name if original else key).replace('.', '_')}" for name, key in pairs.items()}

    # --- pictures and prompts ---------------------------------------------------------------------------------

    def encode_images(self, pixels: Tensor) -> Tensor:
        with self._released(), torch.no_grad():
            latents = self.vae.encode(pixels.movedim(1, -1))
            return self.model.model.process_latent_in(latents).clone().to(self.device)

    def decode_latents(self, latents: Tensor) -> Tensor:
        with self._released(), torch.no_grad():
            unscaled = self.model.model.process_latent_out(latents.detach().clone())
            return self.vae.decode(unscaled).movedim(-1, 1).clamp(0, 1)

    def encode_prompt(self, prompt: str, adapted: bool = False) -> ComfyCondition:
        with self._released(), torch.no_grad():
            encoded = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt), show_pbar=False)
            if len(encoded) != 1:
                raise ValueError(f"the CLIP gives {len(encoded)} encodings of one prompt; give a CLIP without hooks")
            cross_attention, extras = encoded[0]
            copies = {key: value.clone() if torch.is_tensor(value) else value for key, value in extras.items()}
            return ComfyCondition(cross_attention.clone().to(self.device), copies)

    token_limit = None  # ComfyUI reads long prompts in parts

    # --- the noise process ------------------------------------------------------------------------------------

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t, sigma_t of z_t = alpha_t z_0 + sigma_t epsilon, and ComfyUI's sigma, each (B,)."""
        timesteps = timesteps.to(self.device)
        if self.prediction_type == "flow":
            sigma = timesteps.float() / 1000
            return 1 - sigma, sigma, sigma
        sigma = self._sampling.sigma(timesteps)
        alpha = (1 + sigma**2).rsqrt()
        return alpha, sigma * alpha, sigma

    def timesteps(self, levels: Tensor) -> Tensor:
        if self.prediction_type == "flow":
            return (1000 * levels.double()).float()
        return (levels.double() * self._sampling.num_timesteps).long()

    def snr(self, timesteps: Tensor) -> Tensor:
        alpha, sigma, _ = self._coefficients(timesteps)
        return (alpha / sigma).square()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma, _ = (_column(c, latents) for c in self._coefficients(timesteps))
        return alpha * latents.to(self.device) + sigma * noise.to(self.device)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        latents, noise = latents.to(self.device), noise.to(self.device)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma, _ = (_column(c, latents) for c in self._coefficients(timesteps))
        return alpha * noise - sigma * latents

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        alpha, _, _ = self._coefficients(timesteps)
        return torch.ones_like(alpha) if self.prediction_type == "epsilon" else alpha

    # --- predictions ------------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[ComfyCondition]) -> Tensor:
        noisy = noisy.to(self.device)
        if len(conditions) != len(noisy):
            raise ValueError(f"predict got {len(conditions)} conditions for {len(noisy)} rows; give one a row")
        alpha, _, sigma = self._coefficients(timesteps)
        x = noisy if self.prediction_type == "flow" else noisy / _column(alpha, noisy)
        inputs = comfy.samplers.cond_cat([self._encoded(condition, noisy) for condition in conditions])
        options = self.model.model_options["transformer_options"].copy()
        options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(options.get("wrappers", {}))
        comfy.patcher_extension.merge_nested_dicts(options["wrappers"], self.model.wrappers, copy_dict1=False)
        options.update(cond_or_uncond=[0] * len(noisy), sigmas=sigma)
        outputs: list[Tensor] = []
        # apply_model returns the denoised latents; what the network itself said is the native prediction.
        hook = self.network.register_forward_hook(lambda module, arguments, output: outputs.append(output))
        try:
            self.model.model.apply_model(x, sigma, transformer_options=options, **inputs)
        finally:
            hook.remove()
        return outputs[-1].float()

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """Every block of the module lists that ComfyUI's networks are made of."""
        names = ("input_blocks", "middle_block", "output_blocks", "joint_blocks", "double_blocks", "single_blocks")
        lists = [getattr(self.network, name) for name in names if hasattr(self.network, name)]
        return [block for part in lists for block in part]

    def _encoded(self, condition: ComfyCondition, noisy: Tensor) -> dict[str, Any]:
        """What the model's `extra_conds` makes of a condition, for one row of latents of this shape."""
        shape = tuple(noisy.shape[1:])
        if shape not in condition.encoded:
            conds = comfy.sampler_helpers.convert_cond([[condition.cross_attention, condition.extras]])
            noise = torch.zeros_like(noisy[:1])
            conds = comfy.samplers.process_conds(self.model.model, noise, {"positive": conds}, self.device)
            encoded = conds["positive"][0]["model_conds"]
            condition.encoded[shape] = {
                key: value.process_cond(batch_size=1, area=None) for key, value in encoded.items()
            }
        return condition.encoded[shape]

    def sample(
        self,
        conditions: Sequence[ComfyCondition],
        negative: ComfyCondition,
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """By ComfyUI's own sampler: `ddim`, with the schedule of that name for epsilon and v models."""
        flow = self.prediction_type == "flow"
        with torch.no_grad():
            samples = comfy.sample.sample(
                self.model,
                noise.detach().cpu(),
                steps,
                guidance,
                "euler" if flow else "ddim",
                "simple" if flow else "ddim_uniform",
                [_joined(conditions)],
                [_joined([negative] * len(noise))],
                torch.zeros_like(noise, device="cpu"),
                disable_pbar=True,
                seed=0,
            )
            self.model.pre_run()  # the sampler ended the run
            return self.model.model.process_latent_in(samples).to(self.device)


def apply_adapter(model, tensors: Mapping[str, Tensor], strength: float):
    """A clone of a MODEL with a LoRA's tensors patched in, as the stock LoraLoader does it.

    Raises:
        ValueError: the LoRA was made for another model, which the stock loader only logs.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False)
    if not patches:
        raise ValueError("this LoRA was made for another model: none of its layers is in this one")
    weights = model.model.state_dict()
    for key, patch in patches.items():
        name = key if isinstance(key, str) else key[0]
        up, down = getattr(patch, "weights", (None, None))[:2]
        if torch.is_tensor(up) and torch.is_tensor(down) and isinstance(key, str):
            made, own = (up.shape[0], down[0].numel()), (len(weights[name]), weights[name][0].numel())
            if made != own:
                raise ValueError(f"this LoRA was made for another model: {name} is {own} here and {made} there")
    patched = model.clone()
    patched.add_patches(patches, strength)
    return patched


# --- helpers ------------------------------------------------------------------------------------------------------


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), to multiply latents with."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _normal_view(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save, over the same bytes as an inference tensor."""
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.nn.Parameter(view, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else view


@contextmanager
def _layers_out(network: torch.nn.Module) -> Iterator[None]:
    """The network's own layers in their places, without the adapter's layers around them."""
    wrapped = [(name, module) for name, module in network.named_modules() if hasattr(module, "base_layer")]
    places = [(network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], m) for name, m in wrapped]
    for parent, leaf, module in places:
        parent._modules[leaf] = module.base_layer
    try:
        yield
    finally:
        for parent, leaf, module in places:
            parent._modules[leaf] = module


def _joined(conditions: Sequence[ComfyCondition]) -> list:
    """One CONDITIONING entry with a row for each condition; shorter prompts are repeated, as ComfyUI itself does."""
    length = math.lcm(*(condition.cross_attention.shape[1] for condition in conditions))
    rows = [c.cross_attention.repeat(1, length // c.cross_attention.shape[1], 1) for c in conditions]
    extras = dict(conditions[0].extras)
    for key, value in extras.items():
        if torch.is_tensor(value):
            extras[key] = torch.cat([condition.extras[key] for condition in conditions])
    return [torch.cat(rows), extras]


def _check_supported(model) -> None:
    reasons = {
        "pages its weights (dynamic VRAM); start ComfyUI with --disable-dynamic-vram": model.is_dynamic(),
        "carries a LoRA in bypass mode; load that LoRA without bypass": bool(model.injections),
        "carries hooks; connect it without them": bool(model.hook_patches) or model.forced_hooks is not None,
        "has a function wrapped around it by another node; connect the model from before that node": (
            "model_function_wrapper" in model.model_options
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this model cannot be trained on: it {reason}")


def _check_weights(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        quantised = isinstance(parameter, comfy.quant_ops.QuantizedTensor) or parameter.dtype.itemsize < 2
        if quantised:
            raise ValueError(f"this model's {name} is quantised to {parameter.dtype}; train on a 16 or 32 bit model")


def _prediction_type(sampling) -> str:
    kinds = comfy.model_sampling
    discrete = getattr(type(sampling), "sigma", None) is kinds.ModelSamplingDiscrete.sigma
    if discrete and isinstance(sampling, kinds.EPS) and not isinstance(sampling, (kinds.EDM, kinds.X0)):
        return "v_prediction" if isinstance(sampling, kinds.V_PREDICTION) else "epsilon"
    plain_flow = isinstance(sampling, kinds.CONST) and not isinstance(sampling, kinds.IMG_TO_IMG_FLOW)
    if plain_flow and getattr(sampling, "noise_scale", 1.0) == 1.0:
        return "flow"
    known = "epsilon and v on 1000 steps, and rectified flow"
    names = "/".join(base.__name__ for base in type(sampling).__bases__)
    raise ValueError(f"this model samples by {names}, but training knows {known}; connect another model")
