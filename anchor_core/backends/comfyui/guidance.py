"""The guidance rules in ComfyUI: a patch on MODEL under which a sampler that asks for (cond, uncond) follows a rule.

All branches of a step run in one call of `calc_cond_batch`, with the adapter's strength by row (`comfyui_rows`). The
sampler is given (what the rule leads towards, what it leads away from) in the place of (cond, uncond), so that its cfg
stays the scale and patches on it keep working.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...branches import CLASS, Branch, step_at
from ...checks import check_number, named
from ...guidance import Rule
from .apply import adapter_patches
from .attention import WordAttention, word_position
from .families import TextInput
from .rows import Patches, RowStrengths, check_layers

KEY = "anchor_guidance"
FUNCTION = "sampler_calc_cond_batch_function"


def guide_model(
    model: comfy.model_patcher.ModelPatcher,
    lora: Mapping[str, Tensor],
    rule: Rule,
    *,
    strength: float = 1.0,
    class_conditioning: list | None = None,
    early_lora: Mapping[str, Tensor] | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL with a LoRA at `strength`, sampled by `rule`; the sampler's cfg is the scale.

    A branch at strength s has the LoRA at s * strength; LoRAs that the MODEL carries already count as pretrained. The
    parts of a LoRA for the text encoder are left out: whoever encodes the prompts applies them. Steps are those of the
    sampling itself; a sampler that asks between two steps gets what the first of them says.

    Args:
        class_conditioning: CONDITIONING of the class prompt. What it lacks, such as a ControlNet, an area or an inpaint
            mask, it takes from the positive one, where both are one prompt.
        early_lora: of an early checkpoint of the same training, for rules that ask for one.

    Raises:
        ValueError: one sentence that names the input: something the rule needs is missing or unfit for this model.
    """
    check_number("strength", strength)
    if FUNCTION in model.model_options:
        raise ValueError(
            "model already has a function that makes its predictions, such as another guidance; connect the model from "
            "before that node"
        )
    branches = rule.branches
    if not any(branch.prompt == "class" for branch in branches):
        class_conditioning = None
    elif class_conditioning is None:
        raise ValueError(f"class_conditioning is not connected, but the rule {rule.name!r} leads to the class prompt")
    if early_lora is None and any(branch.early for branch in branches):
        raise ValueError(f"early_lora is not connected, but the rule {rule.name!r} has an early checkpoint")
    if rule.masked and not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            f"the rule {rule.name!r} reads the cross-attention of a UNet, but this model, "
            f"{type(model.model).__name__}, has none; take mixed"
        )
    loras = [("lora", lora)] + ([("early_lora", early_lora)] if any(branch.early for branch in branches) else [])
    adapters = [_patches(model, name, tensors) for name, tensors in loras]
    if any(branch.early or branch.strength != 1 for branch in branches):
        check_layers(model.model, adapters)
    guided = model.clone()
    guided.add_patches(adapters[0], strength)
    guidance = _Guidance(rule, adapters, strength, class_conditioning)
    guided.set_model_sampler_calc_cond_batch_function(guidance.predict)
    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, guidance.sample)
    guided.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, guidance.apply)
    return guided


def make_guider(
    model: comfy.model_patcher.ModelPatcher, positive: list, negative: list, cfg: float
) -> comfy.samplers.CFGGuider:
    """A GUIDER over a guided MODEL, as KSampler makes one for itself."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(check_number("cfg", cfg))
    return guider


def _patches(model: comfy.model_patcher.ModelPatcher, name: str, lora: Mapping[str, Tensor]) -> Patches:
    with named(getattr(lora, "file", "") or name):
        return adapter_patches(model, lora)


@dataclass
class _Run:
    """One sampling."""

    guider: comfy.samplers.CFGGuider
    strengths: RowStrengths
    word: WordAttention | None
    sigmas: list[float]
    pictures: int = 0  # of a prediction; none before the first
    branches: list[Branch] = field(default_factory=list)  # of the batch that is being predicted
    away: Branch | None = None
    watches: bool = False  # whether `word` is looked for
    uuids: dict[tuple, uuid.UUID] = field(default_factory=dict)

    def named(self, branch: Branch, conds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A prompt under other names for each strength: caches of other nodes go by the name of a prompt."""
        if branch.strength == 1 and not branch.early:
            return conds
        names = [self.uuids.setdefault((branch, cond["uuid"]), uuid.uuid4()) for cond in conds]
        return [cond | {"uuid": name} for cond, name in zip(conds, names, strict=True)]


class _Guidance:
    """What a guided MODEL and its clones hold: the rule, its inputs, and the sampling that is going on."""

    def __init__(self, rule: Rule, adapters: list[Patches], strength: float, class_conditioning: list | None):
        self._rule, self._adapters, self._strength = rule, adapters, strength
        self._class = class_conditioning
        self._run: _Run | None = None

    def sample(self, executor, noise, latent_image, sampler, sigmas, *arguments, **options):
        """Around the whole sampling: the class prompt joins the others; afterwards nothing is left on the layers."""
        guider = executor.class_obj
        if guider.model_options.get(FUNCTION) != self.predict:
            raise ValueError("another node replaced the guidance on this model; connect that node before the guidance")
        conds = guider.conds
        text = TextInput.of(guider.model_patcher.model)
        for name, each in conds.items():
            for cond in each:
                text.check(name, cond.get("cross_attn"), cond)
        if self._class is not None:
            conds["class"] = _class_conds(self._class, conds["positive"], text)
        word = WordAttention(word_position(conds["positive"], conds["class"])) if self._rule.masked else None
        outer = self._run
        strengths = RowStrengths(guider.model_patcher, self._adapters, self._strength)
        self._run = _Run(guider, strengths, word, sigmas.tolist())
        try:
            return executor(noise, latent_image, sampler, sigmas, *arguments, **options)
        finally:
            self._run = outer
            strengths.close()

    def predict(self, arguments: dict[str, Any]) -> list[Tensor]:
        """[what the rule leads towards, what it leads away from]: x0 predictions (B, C, ...) at one sigma.

        Without a negative prompt, as ComfyUI asks at a cfg of 1, and outside the rule's interval both are the first.
        """
        run, (positive, negative) = self._run, arguments["conds"]
        if run is None:
            raise ValueError("this model was sampled without a guider, but guidance needs one; take a KSampler node")
        model, x, sigma, options = (arguments[name] for name in ("model", "input", "sigma", "model_options"))
        run.pictures = len(x)
        step, steps = step_at(float(sigma[0]), run.sigmas), max(len(run.sigmas) - 1, 1)
        table = self._rule.table(step, steps)
        guided = negative is not None and self._rule.scale_at(step, steps, 2.0) != 1
        branches = table.branches(2.0 if guided else 1.0)
        prompts = {"subject": positive, "class": run.guider.conds.get("class"), "null": negative}
        run.branches, run.away, run.watches = branches, table.away if guided else None, table.outside is not None
        try:
            conds = [run.named(branch, prompts[branch.prompt]) for branch in branches]
            outputs = comfy.samplers.calc_cond_batch(model, conds, x, sigma, options)
            predictions = dict(zip(branches, outputs, strict=True))
            mask = run.word.mask(table.quantile) if run.watches else None
        finally:
            run.branches = []
            if run.watches:
                run.word.forget()
        towards = table.conditional(predictions, mask)
        away = predictions[table.away] if guided else towards
        return [towards, away.clone() if away is towards else away]  # patches may write into either

    def apply(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **options):
        """Around the network: its rows get the strengths of their branches."""
        run, arguments = self._run, (x, t, c_concat, c_crossattn, control)
        if run is not None and not run.pictures:
            raise ValueError("the guider asked for no guidance on this model; take CFGGuider, KSampler or AnchorGuider")
        if run is None or not run.branches:  # another patch asks for a prediction of its own
            return executor(*arguments, transformer_options, **options)
        branches = [run.branches[i] for i in transformer_options["cond_or_uncond"]]
        # 0 and 1, as other patches know them, which may index two things with it.
        transformer_options = transformer_options | {"cond_or_uncond": [int(each == run.away) for each in branches]}
        by_row = run.watches or any(each.early or each.strength != 1 for each in branches)
        if by_row and len(x) != run.pictures * len(branches):
            raise ValueError(
                f"another node on this model runs the network on {len(x)} rows for {len(branches)} predictions of "
                f"{run.pictures} pictures, so that strengths cannot differ by row; take that node off"
            )
        shares = [(0.0, each.strength) if each.early else (each.strength, 0.0) for each in branches]
        shares = [share[: len(self._adapters)] for share in shares]
        model = executor.class_obj
        with run.strengths.rows(model, len(x), shares):
            if not run.watches or CLASS not in branches:
                return executor(*arguments, transformer_options, **options)
            first = branches.index(CLASS) * run.pictures
            with run.word.watch(model.diffusion_model, slice(first, first + run.pictures), x.shape[-2:]):
                return executor(*arguments, transformer_options, **options)


# --- conditionings ------------------------------------------------------------------------------------------------


def _width(conds: list[dict[str, Any]]) -> int | None:
    """Of the prompts' embeddings; None where a model takes none."""
    return next((cond["cross_attn"].shape[-1] for cond in conds if cond.get("cross_attn") is not None), None)


def _class_conds(conditioning: list, positive: list[dict[str, Any]], text: TextInput) -> list[dict[str, Any]]:
    """The class prompt as the guider holds prompts, with what it lacks from the subject's where both are one."""
    if comfy.sampler_helpers.cond_has_hooks(conditioning):
        raise ValueError("class_conditioning carries hooks, which would not be loaded; encode it without them")
    conds = comfy.sampler_helpers.convert_cond(conditioning)
    if len(conds) == len(positive) == 1:
        conds = [{**positive[0], **conds[0]}]
    for cond in conds:
        text.check("class_conditioning", cond.get("cross_attn"), cond)
    width, takes = _width(conds), _width(positive)
    if width != takes:
        raise ValueError(
            f"class_conditioning has a width of {width}, but positive one of {takes}; encode both with the model's CLIP"
        )
    return conds
