"""The denoiser over the model that ComfyUI manages: its own weights, no second load, no copy.

Inside `with ComfyDenoiser(model, clip, vae) as denoiser:` the network can be trained through; afterwards the model
holds the very parameters, modules and flags that it held before, also when the block ends by an error or an interrupt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn

from ...adapters.adapter import Adapter
from ...adapters.config import AdapterConfig
from ...adapters.kinds import FILE_KINDS
from ...adapters.layers import matching_in_all
from ...adapters.tokens import start_vectors
from ...checks import check_count, check_number
from . import families
from .apply import apply_adapter
from .batching import batches, with_own_options
from .encoding import ComfyCondition, Encoding
from .gradients import copied_where_overwritten, register_kernels
from .layers import is_plain, plain_values
from .noise import NoiseProcess
from .patches import tell_of_attention, told_apart, training_options, without_compiling
from .tokens import word_ids
from .trainable import check_trainable
from .weights import TrainableWeights

__all__ = ["ComfyCondition", "ComfyDenoiser", "apply_adapter"]

TRAINING_GUIDANCE = 1.0
"""What a network with an embedded guidance scale (Flux.1-dev) is told in `predict`; `sample` leaves it ComfyUI's."""


class ComfyDenoiser(Encoding, NoiseProcess):
    """`Denoiser` over a MODEL, CLIP and VAE of ComfyUI.

    Epsilon and v models: timesteps lie on the discrete axis 0 ... 999 and z_t = alpha_t z_0 + sigma_t epsilon, as in
    diffusers; ComfyUI's own x = z_t / alpha_t at its sigma = sigma_t / alpha_t stays inside. Flow models: timesteps are
    1000 sigma and z_t = (1 - sigma) z_0 + sigma epsilon, whatever the shift of the sampling schedule. LoRAs that the
    MODEL already carries are part of the pretrained network. Latents are (B, C, h, w), for video models too: a picture
    is one frame.

    Attributes:
        cancellable: `predict` ends by ComfyUI's own exception once Cancel was pressed. Off in a training, which looks
            between its steps and keeps them.

    Raises:
        ValueError: the model cannot be trained through; one sentence says why.
    """

    def __init__(self, model, clip, vae):
        families.check_makes_pictures(model.model)
        check_trainable(model)
        register_kernels()
        self.model, self.clip, self.vae = model, clip, vae
        self.cancellable = False
        self.adapter: Adapter | None = None
        self.prediction_type = families.prediction_type(model.get_model_object("model_sampling"))
        self._video = families.takes_frames(model.model)
        self._guided = families.is_guided(model.model)
        self._text_input = families.TextInput.of(model.model)
        self._file_keys = families.file_keys(model.model) | families.text_keys(self.text_encoders)
        self._weights = TrainableWeights(model)
        self._stack: ExitStack | None = None

    # --- the model that ComfyUI manages -----------------------------------------------------------------------

    def __enter__(self) -> ComfyDenoiser:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.callback(setattr, comfy.model_management, "in_training", comfy.model_management.in_training)
            comfy.model_management.in_training = True
            stack.callback(self.model.cleanup)
            stack.callback(without_compiling(self.model))
            stack.callback(lambda: self._weights.restore())
            stack.callback(self.detach)
            for block in families.find_blocks(self.network):
                stack.callback(block.register_forward_pre_hook(with_own_options, with_kwargs=True).remove)
            self._weights.load()
            tell_of_attention(self.model)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        stack, self._stack = self._stack, None
        stack.close()

    @property
    def network(self) -> nn.Module:
        return self.model.model.diffusion_model

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.model.model.get_dtype_inference()

    def make_room(self, needed: int) -> int:
        management, own = comfy.model_management, [self.model]
        if self.adapter is not None and self.adapter.config.trains_text:
            own.append(self.clip.patcher)
        paged, held = self.model.is_dynamic(), management.current_loaded_models
        if not management.is_device_cpu(self.device):
            keep = [loaded for loaded in held if loaded.model in own]
            with torch.inference_mode():  # as in every prompt: what is moved stays what it was
                management.free_memory(needed, self.device, keep_loaded=keep, for_dynamic=paged)
            lacking = needed - management.get_free_memory(self.device)
            self._weights.reserve(needed, offloading=not paged and 0 < lacking <= self.model.loaded_size())
        # Pages are given up on demand, those of others first.
        pages = [
            loaded.model for loaded in held if paged and loaded.device == self.device and loaded.model.is_dynamic()
        ]
        return int(management.get_free_memory(self.device)) + sum(model.loaded_size() for model in pages)

    @property
    def family(self) -> str:
        return families.family(self.model.model)

    @property
    def architecture(self) -> str:
        """The modelspec name of the architecture."""
        return families.architecture(self.model.model)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The CLIP models that an adapter may train, by their prefix in files."""
        return families.text_encoders(self.clip, self.network)

    @property
    def can_checkpoint(self) -> bool:
        return bool(families.find_blocks(self.network))

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's blocks; ValueError if they are not known."""
        blocks = families.find_blocks(self.network)
        if not blocks:
            kind = type(self.network).__name__
            raise ValueError(f"gradient_checkpointing is on, but the blocks of a {kind} are not known; switch it off")
        return blocks

    # --- the adapter ------------------------------------------------------------------------------------------

    def attach(self, config: AdapterConfig, seed: int = 0, vectors: Mapping[str, Tensor] | None = None) -> Adapter:
        """Inject a new adapter into the network; call inside the `with` block.

        Args:
            vectors: what the token vectors start from instead of `config.initial`, (count, width) by text encoder.

        Raises:
            ValueError: there is one already, or `config` asks for what this model cannot have.
        """
        families.check_size(config, self.network)
        if self._stack is None:
            raise RuntimeError("attach was called outside the `with` block; enter the denoiser first")
        if self.adapter is not None:
            raise ValueError("the denoiser already has an adapter; detach it first")
        networks = {"": self.network}
        if config.trains_text:
            encoders = self._text_encoders_to_train()
            networks |= encoders if config.text_encoder else {}
        if config.vectors and vectors is None:
            word, tokenizers = config.initial or config.token, families.text_tokenizers(self.clip, self.network)
            read = {name: (word_ids(tokenizer, word), encoders[name]) for name, (_, tokenizer) in tokenizers.items()}
            vectors = start_vectors(word, config.vectors, read)
        try:
            if any(FILE_KINDS[kind].reads_weights for kind in config.used_kinds):
                self._hold_weights(networks, config)
            self.adapter = Adapter.attach(networks, config, seed, self.file_keys(), vectors)
        except BaseException:
            self._weights.let_go()
            raise
        for name in self.adapter.module_names:  # peft puts parameters where the weight is, which may be offloaded
            device = self.clip.patcher.load_device if ":" in name else self.device
            for parameter in self.adapter.layer(name).parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device)
        for parameter in self.adapter.tokens.vectors.values() if self.adapter.tokens is not None else ():
            parameter.data = parameter.data.to(self.clip.patcher.load_device)
        return self.adapter

    def _hold_weights(self, networks: Mapping[str, nn.Module], config: AdapterConfig) -> None:
        """Let the layers of an adapter that reads weights hold theirs, where they do not."""
        chosen = matching_in_all(dict(networks), config.layers, norms="full" in config.used_kinds)
        for prefix, names in chosen.items():
            device, dtype = self.device, self.compute_dtype
            if prefix:
                device, dtype = self.clip.patcher.load_device, torch.float32
            kinds = {name: config.kind_of(f"{prefix}:{name}" if prefix else name) for name in names}
            layers = [networks[prefix].get_submodule(name) for name in names if FILE_KINDS[kinds[name]].reads_weights]
            self._weights.hold(layers, dtype, device)

    def _text_encoders_to_train(self) -> dict[str, nn.Module]:
        """The text encoders, loaded beside the network from now on."""
        if not self.text_encoders:
            raise ValueError("text_encoder or vectors is set, but this model's text encoder is no CLIP; leave both off")
        check_trainable(self.clip.patcher)
        self._weights.restore()
        self._weights = TrainableWeights(self.model, self.clip.patcher)
        self._weights.load()
        return self.text_encoders

    def detach(self) -> None:
        """Take the adapter out, if there is one: the network gets its own modules back."""
        adapter, self.adapter = self.adapter, None
        if adapter is not None:
            adapter.detach()
        self._weights.let_go()

    def weight_of(self, layer: nn.Module) -> Tensor:
        """What the weight that a layer holds stands for."""
        return layer.weight if is_plain(layer.weight) else plain_values(layer, layer.weight, self.device)

    def adapter_disabled(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def file_keys(self) -> dict[str, str]:
        """Names of the network's modules to key prefixes that the stock LoraLoader reads."""
        return dict(self._file_keys)

    # --- predictions ------------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[ComfyCondition]) -> Tensor:
        if not len(noisy) == len(timesteps) == len(conditions):
            raise ValueError(
                f"predict got {len(noisy)} latents, {len(timesteps)} timesteps and {len(conditions)} conditions, "
                "but it takes one of each a row"
            )
        if self.cancellable:
            comfy.model_management.throw_exception_if_processing_interrupted()
        noisy = noisy.to(self.device)
        x, sigma = self._as_comfy(self._frames(noisy), timesteps)
        encoded = [self._encoded(condition, x) for condition in conditions]
        said: dict[int, Tensor] = {}
        for rows in batches(encoded):
            output = self._native(x[rows], sigma[rows], comfy.samplers.cond_cat([encoded[row] for row in rows]))
            said.update(zip(rows, self._pictures(output)))
        return torch.stack([said[row] for row in range(len(noisy))])

    def _native(self, x: Tensor, sigma: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What the network itself says of ComfyUI's x at its sigma, (B, ...), in float32."""
        self._weights.load_again()
        self.model.model_patches_call_function("cleanup")  # what a patch keeps from step to step
        options = training_options(self.model) | {"cond_or_uncond": [0] * len(x), "sigmas": sigma}
        outputs: list[Tensor] = []
        # apply_model returns the denoised latents; what the network itself said is the native prediction.
        hook = self.network.register_forward_hook(lambda module, arguments, output: outputs.append(output))
        try:
            with told_apart(self.model), copied_where_overwritten(self.network):
                self.model.model.apply_model(x, sigma, transformer_options=options, **inputs)
        finally:
            hook.remove()
        said = outputs[-1]
        if not torch.is_tensor(said) or said.shape != x.shape:
            given = tuple(said.shape) if torch.is_tensor(said) else type(said).__name__
            raise ValueError(
                f"this model gives {given} for latents of {tuple(x.shape)}; connect one that denoises them"
            )
        return said.float()

    def _encoded(self, condition: ComfyCondition, x: Tensor) -> dict[str, comfy.conds.CONDRegular]:
        """What the model's `extra_conds` makes of a condition, for one row of latents of this shape."""
        shape = tuple(x.shape[1:])
        if shape not in condition.encoded:
            extras = condition.extras | ({"guidance": TRAINING_GUIDANCE} if self._guided else {})
            conds = comfy.sampler_helpers.convert_cond([[condition.cross_attention, extras]])
            # Some models send the prompt through layers of their own here, once for all steps: without the adapter.
            with torch.set_grad_enabled(condition.cross_attention.requires_grad), self.adapter_disabled():
                noise = torch.zeros_like(x[:1])
                # As where nothing is connected to a sampler: models of further channels take an empty picture.
                conds = comfy.samplers.process_conds(
                    self.model.model, noise, {"positive": conds}, self.device, latent_image=noise, seed=0
                )
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
        """By ComfyUI's own sampler: `ddim`, with the schedule of that name, for epsilon and v models; `euler` on the
        `simple` schedule for flow models, at their shift. Rows of one condition run in one batch."""
        check_count("steps", steps)
        check_number("guidance", guidance)
        rows_of: dict[int, list[int]] = {}
        for row, condition in enumerate(conditions):
            rows_of.setdefault(id(condition), []).append(row)
        samples: dict[int, Tensor] = {}
        with torch.no_grad():
            for rows in rows_of.values():
                latents = self._sample_rows(conditions[rows[0]], negative, noise[rows], steps, guidance)
                samples.update(zip(rows, latents))
            self.model.pre_run()  # the sampler ended the run
        return torch.stack([samples[row] for row in range(len(noise))]).to(self.device)

    def _sample_rows(
        self, condition: ComfyCondition, negative: ComfyCondition, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        noise = self._frames(noise.detach().cpu())
        samples = comfy.sample.sample(
            self.model,
            noise,
            steps,
            guidance,
            *(("euler", "simple") if self.prediction_type == "flow" else ("ddim", "ddim_uniform")),
            [[condition.cross_attention, dict(condition.extras)]],
            [[negative.cross_attention, dict(negative.extras)]],
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        return self._pictures(self.model.model.process_latent_in(samples))
