"""A model, a LoRA and prompts to be guided in ComfyUI, and what ComfyUI's own loader and CFG predict of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.lora
import comfy.samplers
import comfy.sd
import comfy_models as models
import torch
from torch import Tensor, nn

from anchor_core.backends.comfyui.guidance import guide_model, make_guider
from anchor_core.guidance import make_rule

SUBJECT, CLASS, NULL = "a photo of a sks dog", "a photo of a dog", ""
STRENGTH, SCALE = 0.8, 3.0


def make_lora(model, kind: str = "lora", seed: int = 0, size: float = 0.3) -> dict[str, Tensor]:
    """A file's tensors for every linear and convolution layer; `difference` changes norms and biases as well."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=draw)

    tensors = {}
    for name, layer in model.model.diffusion_model.named_modules():
        key = f"diffusion_model.{name}"
        if kind == "difference" and isinstance(layer, (nn.GroupNorm, nn.LayerNorm)) and layer.bias is not None:
            tensors |= {f"{key}.w_norm": normal(*layer.weight.shape), f"{key}.b_norm": normal(*layer.bias.shape)}
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        out, inside, *kernel = layer.weight.shape
        fan = layer.weight[0].numel()
        if kind in ("lora", "dora"):
            down = normal(2, inside, *kernel) * fan**-0.5
            tensors |= {f"{key}.lora_up.weight": normal(out, 2, *[1] * len(kernel)), f"{key}.lora_down.weight": down}
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
        if kind == "dora":
            tensors[f"{key}.dora_scale"] = 1 + normal(out, 1, *[1] * len(kernel)).abs()
        if kind == "lokr" and out % 2 == 0 == inside % 2:
            tensors |= {
                f"{key}.lokr_w1": 5 * normal(2, 2) * fan**-0.5,
                f"{key}.lokr_w2": normal(out // 2, inside // 2, *kernel),
            }
        if kind == "loha":
            for side in ("hada_w1", "hada_w2"):
                tensors |= {f"{key}.{side}_a": normal(out, 2), f"{key}.{side}_b": 3 * normal(2, fan) * fan**-0.25}
        if kind == "difference":
            tensors[f"{key}.diff"] = normal(*layer.weight.shape) * fan**-0.5
            if layer.bias is not None:
                tensors[f"{key}.diff_b"] = normal(*layer.bias.shape)
    return tensors


def make_sliced_lora(model, seed: int = 0) -> dict[str, Tensor]:
    """In diffusers' names, of which several are slices of one weight, or are turned around."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    weights, keys = model.model.state_dict(), comfy.lora.model_lora_keys_unet(model.model, {})
    for key, target in keys.items():
        sliced = isinstance(target, tuple) and target[0] in weights and key.startswith("transformer.")
        if not sliced or "mlp" in key:  # ComfyUI cuts the latter as for Flux's own ratio
            continue
        weight = weights[target[0]]
        out, inside = (weight if target[1] is None else weight.narrow(*target[1])).shape
        for part, shape in (("lora_A", (2, inside)), ("lora_B", (out, 2))):
            tensors[f"{key}.{part}.weight"] = 0.3 * torch.randn(shape, generator=draw)
    return tensors


class Case:
    """A family's model with a LoRA, an early checkpoint of it, prompts, and pictures of noise."""

    def __init__(self, family: str, kind: str = "lora", steps: int = 2):
        self.steps = steps
        self.model, clip, _ = models.build(family)
        self.lora, self.early = make_lora(self.model, kind), make_lora(self.model, kind, seed=1)
        self.conds = {prompt: clip.encode_from_tokens_scheduled(prompt) for prompt in (SUBJECT, CLASS, NULL)}
        if len(self.conds[SUBJECT][0][0][0]) == len(self.conds[CLASS][0][0][0]):  # as CLIP: alike up to the token
            self.conds[CLASS][0][0][:, :5] = self.conds[SUBJECT][0][0][:, :5]
        shape = (2, *models.latent_shape(family))
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        if self.model.model.latent_format.latent_dimensions == 3:
            self.noise = self.noise.unsqueeze(2)

    def stock(self, strength: float = STRENGTH, lora: Mapping[str, Tensor] | None = None):
        lora = dict(self.lora if lora is None else lora)
        return comfy.sd.load_lora_for_models(self.model, None, lora, strength, 0.0)[0]

    def guided(self, rule: str, model=None, **options):
        early = self.early if options.get("early") else None
        return guide_model(
            model or self.model,
            self.lora,
            make_rule(rule, **options),
            strength=STRENGTH,
            class_conditioning=self.conds[CLASS],
            early_lora=early,
        )

    def denoised(self, model, prompt: str = SUBJECT, cfg: float = SCALE, negative: str = NULL) -> list[Tensor]:
        """What a sampler is told of one noisy picture at each of its steps."""
        said: list[Tensor] = []

        def listen(denoise: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, **_) -> Tensor:
            start = 0.5 * x
            for sigma in sigmas[:-1]:
                said.append(denoise(start, sigma * x.new_ones(len(x)), **extra_args))
            return x

        sampler = comfy.samplers.KSAMPLER(lambda model, x, sigmas, extra_args, callback, disable: listen(
            model, x, sigmas, extra_args
        ))  # fmt: skip
        self.sample(model, sampler, prompt, cfg, negative)
        return said

    def sample(self, model, sampler, prompt: str = SUBJECT, cfg: float = SCALE, negative: str = NULL) -> Tensor:
        guider = make_guider(model, self.conds[prompt], self.conds[negative], cfg)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", self.steps)
        return guider.sample(self.noise, torch.zeros_like(self.noise), sampler, sigmas, disable_pbar=True, seed=0)

    def picture(self, model, **options) -> Tensor:
        return self.sample(model, comfy.samplers.sampler_object("euler"), **options)

    def branch(self, prompt: str = SUBJECT, strength: float = 1.0, early: bool = False) -> list[Tensor]:
        """One branch's predictions, by ComfyUI's own loader."""
        model = self.stock(strength * STRENGTH, self.early if early else None)
        return self.denoised(model, prompt, cfg=1.0)


def led(towards: list[Tensor], away: list[Tensor], scale: float = SCALE) -> list[Tensor]:
    return [b + scale * (a - b) for a, b in zip(towards, away, strict=True)]


def mixed(one: list[Tensor], other: list[Tensor], share: float) -> list[Tensor]:
    return [(1 - share) * a + share * b for a, b in zip(one, other, strict=True)]


def assert_same(ours: list[Tensor] | Tensor, theirs: list[Tensor] | Tensor, atol: float = 2e-4) -> None:
    pairs = list(zip(ours, theirs, strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=atol * b.abs().max().item(), rtol=0)


def far(one: list[Tensor], other: list[Tensor]) -> bool:
    return all((a - b).abs().max() > 1e-2 * b.abs().max() for a, b in zip(one, other, strict=True))


def anatomy(model) -> list:
    """What ComfyUI itself leaves alone, which is not the parameter objects: classes and hooks of every module."""
    modules = model.model.named_modules()
    return [(n, type(m), [*vars(m)], len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules]
